"""What weights of few bits are worth to a decoder that gives one token at a time: a model of GPT-2's size with random weights, in ONNX Runtime.

Size of the file, tokens per second and agreement with the fake-quantized model, against the same model in float.

Run: ``python benchmarks/weights_only.py [--layers 12] [--threads 2] [--recipes w4_group32 w8_weights_only] [--unchecked]`` (about five minutes and 6 GB)
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_cco as cc
from lightning_cco.monitoring.tables import text_table

PROMPT, TOKENS, RUNS = 32, 16, 5


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
    """A file in ONNX Runtime."""

    def __init__(self, path: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, ids: np.ndarray, past: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.session.run(None, {"ids": ids, "past": past})


def tokens_per_second(files: dict[str, InEngine], prompt: Tensor, past: Tensor) -> dict[str, float]:
    """The median over runs of the files one after the other, the same tokens for all."""
    seconds: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(RUNS):
        for name, file in files.items():
            _, cache = file(prompt.numpy(), past.numpy())
            start = time.perf_counter()
            for token in range(TOKENS):
                _, cache = file(np.array([[token]]), cache)
            seconds[name].append(time.perf_counter() - start)
    return {name: TOKENS / statistics.median(entries) for name, entries in seconds.items()}


def agreement(file: InEngine, model: Decoder, prompt: Tensor, past: Tensor) -> float:
    """Signal-to-noise ratio of the file's logits against the fake-quantized model's, in dB: of the prompt, and of one token after the other behind it."""
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


def measure(layers: int, threads: int, recipes: list[str], check: bool) -> str:
    """The table, as text."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model = Decoder(layers).eval()
    prompt = torch.randint(0, 50257, (1, PROMPT))
    past = model.no_past()
    with torch.no_grad():
        example = prompt[:, :3], model(prompt[:, :5], past)[1]
    shapes = {"ids": {1: torch.export.Dim("new", max=256)}, "past": {4: torch.export.Dim("before", max=512)}}
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {"float": Path(folder) / "float.onnx"}
        float_file(model, example, shapes, paths["float"])
        decibels = {"float": ""}
        for recipe in recipes:
            paths[recipe] = Path(folder) / f"{recipe}.onnx"
            quantized = cc.quantize(model, recipe, example)
            quantized.calibrate([example])
            report = quantized.export(paths[recipe], dynamic_shapes=shapes, dynamic_batch=False, check=check)
            print(report, flush=True)
            decibels[recipe] = f"{agreement(InEngine(paths[recipe], threads), model, prompt, past):.1f}"
            quantized.remove()
        sizes = {name: sum(part.stat().st_size for part in Path(folder).glob(f"{path.name}*")) for name, path in paths.items()}
        del model
        speeds = tokens_per_second({name: InEngine(path, threads) for name, path in paths.items()}, prompt, past)
    for name in paths:
        part, faster = sizes[name] / sizes["float"], speeds[name] / speeds["float"]
        found[name] = [f"{sizes[name] / 1e6:.0f}", f"{part:.3f}", f"{speeds[name]:.1f}", f"{faster:.2f}", decibels[name]]
    return text_table(
        ["model", "MB", "of float", "tokens/s", "times float", "dB"], [[name, *row] for name, row in found.items()], right=[1, 2, 3, 4, 5]
    )


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipes", nargs="+", default=["w4_group32", "w8_weights_only"])
    parser.add_argument("--unchecked", action="store_true", help="leave out the check of each file, which takes most of the time")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(measure(options.layers, options.threads, options.recipes, not options.unchecked))


if __name__ == "__main__":
    main()
