"""What weights of few bits are worth to a decoder that gives one token at a time: a model of GPT-2's size with random weights, in ONNX Runtime.

Size of the file, tokens per second and agreement with the fake-quantized model, against the same model in float; and what the accuracy level of the products
is worth: 4 rounds what they read to 8 bits, 1 computes in float. What training gives is in `weights_training.py`.

Run: ``python benchmarks/weights_only.py [--layers 12] [--threads 2] [--rounds 9] [--recipes w4_group32 …] [--levels 4 1] [--unchecked] [--write]`` (ten minutes
and 8 GB)
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from report import Table, parser, publish
from torch import Tensor, nn

import lightning_cco as cc

PROMPT, TOKENS = 32, 16
ZERO_POINTS = "w4_group32, zero points"
RECIPES: dict[str, Any] = {
    ZERO_POINTS: {
        "global_quantization_settings": {
            "weights_num_bits": 4,
            "weights_group_size": 32,
            "weights_symmetric": False,
            "weight_only": True,
            "skip_tail_quantization": False,
        }
    }
}
"""Those that are not shipped under a name."""


class Block(nn.Module):
    """Attention over all that came before, and a multilayer perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, past: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        attended = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask, -1) @ v
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh")), torch.stack([k, v])


class Decoder(nn.Module):
    """GPT-2's shapes; its head is tied to the embedding.

    Args:
        layers: Number of blocks.
        width: Size of an embedding.
        heads: Attention heads of each block.
        vocabulary: Number of tokens.
        length: Longest context.
    """

    def __init__(self, layers: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 50257, length: int = 1024) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks, self.norm = nn.ModuleList(Block(width, heads) for _ in range(layers)), nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02 if "out" not in name and "down" not in name else 0.02 / (2 * layers) ** 0.5)

    def forward(self, ids: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the next token, (batch, new, vocabulary), and the keys and values of all tokens, (layers, 2, batch, heads, tokens, size)."""
        before, new = past.shape[4], ids.shape[1]
        places = torch.arange(new, device=ids.device) + before
        mask = torch.where(torch.arange(before + new, device=ids.device) <= places[:, None], 0.0, -1e4)
        x, present = self.tokens(ids) + self.positions(places), []
        for block, cache in zip(self.blocks, past.unbind(0), strict=True):
            x, new_cache = block(x, cache, mask)
            present.append(new_cache)
        return F.linear(self.norm(x), self.tokens.weight), torch.stack(present)

    def no_past(self) -> Tensor:
        """The cache before the first token."""
        heads = self.blocks[0].heads
        return torch.zeros(len(self.blocks), 2, 1, heads, 0, self.norm.normalized_shape[0] // heads)


class InEngine:
    """A file in ONNX Runtime.

    Args:
        path: The file.
        threads: Of the session.
        level: Accuracy level of its products with blocks; `None`: as the file and the engine have it.
    """

    def __init__(self, path: Path, threads: int, level: int | None = None) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "0"
        )  # the threads of the others would wait on this one's processors
        if level is not None:
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
            path = self._changed(path, level)
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    @staticmethod
    def _changed(path: Path, level: int) -> Path:
        """A copy of the file in which the products that are there already have the level."""
        model = onnx.load(str(path))
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                    attribute.i = level
        changed = path.with_name(f"{path.stem}.{level}.onnx")
        onnx.save(model, str(changed))
        return changed

    def __call__(self, ids: np.ndarray, past: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.session.run(None, {"ids": ids, "past": past})


def tokens_per_second(files: dict[str, InEngine], prompt: Tensor, past: Tensor, rounds: int) -> dict[str, list[float]]:
    """Of each round, in which the files come one after the other with the same tokens; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in files}
    for number in range(rounds + 1):
        for name, file in files.items():
            _, cache = file(prompt.numpy(), past.numpy())
            start = time.perf_counter()
            for token in range(TOKENS):
                _, cache = file(np.array([[token]]), cache)
            if number:
                found[name].append(TOKENS / (time.perf_counter() - start))
    return found


def agreement(file: InEngine, model: Decoder, prompt: Tensor, past: Tensor) -> float:
    """Signal-to-noise ratio of the file's logits against the fake-quantized model's, in dB: of the prompt, and of one token after the other after it."""
    noise = signal = 0.0
    ours, theirs = past, past.numpy()
    with torch.no_grad():
        for ids in [prompt, *(torch.tensor([[token]]) for token in range(4))]:
            expected, ours = model(ids, ours)
            got, theirs = file(ids.numpy(), theirs)
            noise += float(np.square(got - expected.numpy()).sum())
            signal += float(expected.square().sum())
    return 10 * float(np.log10(signal / noise))


def float_file(model: Decoder, example: tuple[Tensor, Tensor], shapes: Any, path: Path) -> None:
    """The float model, written by PyTorch's exporter."""
    torch.onnx.export(model, example, path, dynamo=True, dynamic_shapes=shapes, input_names=["ids", "past"], verbose=False)


def measure(options: argparse.Namespace) -> Table:
    """The table."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model = Decoder(options.layers).eval()
    prompt = torch.randint(0, 50257, (1, PROMPT))
    past = model.no_past()
    with torch.no_grad():
        example = prompt[:, :3], model(prompt[:, :5], past)[1]
    shapes = {"ids": {1: torch.export.Dim("new", max=256)}, "past": {4: torch.export.Dim("before", max=512)}}
    with tempfile.TemporaryDirectory() as folder:
        paths = {"float": Path(folder) / "float.onnx"}
        float_file(model, example, shapes, paths["float"])
        decibels, files = {"float": ""}, {"float": InEngine(paths["float"], options.threads)}
        for number, recipe in enumerate(options.recipes):
            path = Path(folder) / f"{number}.onnx"
            quantized = cc.quantize(model, RECIPES.get(recipe, recipe), example)
            quantized.calibrate([example])
            print(quantized.export(path, dynamic_shapes=shapes, dynamic_batch=False, check=not options.unchecked), flush=True)
            for level in options.levels:
                name = recipe if len(options.levels) == 1 else f"{recipe}, level {level}"
                paths[name], files[name] = path, InEngine(path, options.threads, level)
                decibels[name] = f"{agreement(files[name], model, prompt, past):.1f}"
            quantized.remove()
        sizes = {name: sum(part.stat().st_size for part in _parts(path)) for name, path in paths.items()}
        del model
        speeds = tokens_per_second(files, prompt, past, options.rounds)
    rows = []
    for name in paths:
        ratios = sorted(mine / theirs for mine, theirs in zip(speeds[name], speeds["float"], strict=True))
        low, middle, high = (ratios[round(part * (len(ratios) - 1))] for part in (0.25, 0.5, 0.75))
        faster = "1" if name == "float" else f"{middle:.2f} ({low:.2f} to {high:.2f})"
        part = sizes[name] / sizes["float"]
        rows.append([name, f"{sizes[name] / 1e6:.0f}", f"{part:.3f}", f"{statistics.median(speeds[name]):.1f}", faster, decibels[name]])
    note = (
        f"A decoder of {options.layers} blocks of width 768 with a tied head of 50,257 tokens, random weights, batch 1, a prompt of {PROMPT} tokens and then "
        f"{TOKENS}, one at a time with a cache; ONNX Runtime {ort.__version__}. Times float: by turns, the median of {options.rounds} rounds, and their "
        "quartiles. dB: the file's logits against the fake-quantized model's. Level: `accuracy_level` of `MatMulNBits`; 4 is what the engine takes by itself."
    )
    return Table(
        "weights-only",
        "What are weights of few bits worth to a decoder that gives one token at a time?",
        ["model", "MB", "of float", "tokens/s", "times float", "dB"],
        rows,
        [note],
    )


def _parts(path: Path) -> list[Path]:
    """A file, and its data beside it."""
    return [part for part in path.parent.glob(f"{path.name}*") if part.suffix != ".json"]


def main() -> None:
    """Measure, and print the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=12)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--recipes", nargs="+", default=["w4_group32", ZERO_POINTS, "w4a8_dynamic", "w8_weights_only", "w8a8_dynamic"])
    arguments.add_argument("--levels", nargs="+", type=int, default=[4, 1])
    arguments.add_argument("--unchecked", action="store_true", help="leave out the check of each file, which takes most of the time")
    options = arguments.parse_args()
    publish(measure(options), options)


if __name__ == "__main__":
    main()
