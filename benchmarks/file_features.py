"""What the features are worth that files have for an engine's speed alone: the same network exported with each of them and without.

Run: ``python benchmarks/file_features.py [norms | clamps | sums]`` (a minute or so; `norms` measures batch norms in INT8 against float, `clamps` a ReLU
between a linear layer and one in float, rounded against not, `sums` the products of RMSNorms and gates between floats and linear layers, in float against
INT8)
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lightning_cco as cc
from lightning_cco.export import stored_tensors
from lightning_cco.export.engines import ENGINES, FileFeature
from lightning_cco.export.ort_session import engine_session
from lightning_cco.quantization import planner, targets
from lightning_cco.quantization.groups import Groups
from lightning_cco.quantization.int8_layers import Int8Layers


class Stem(nn.Module):
    """What reads an image in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 64, 7, 2, 3), nn.Conv2d(64, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Dense(nn.Module):
    """A dense block: batch norms that no convolution takes in."""

    def __init__(self, blocks: int = 6, growth: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, 2, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(64 + growth * number) for number in range(blocks))
        self.convs = nn.ModuleList(nn.Conv2d(64 + growth * number, growth, 3, 1, 1) for number in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, torch.relu(conv(torch.relu(norm(x))))], 1)
        return x


class Gated(nn.Module):
    """A block of a language model: an RMSNorm written out, and a gated MLP."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.weight, self.gate, self.up, self.down = (
            nn.Parameter(torch.ones(width)),
            *(nn.Linear(width, 3 * width) for _ in range(2)),
            nn.Linear(3 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
        return x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


def language() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 256), *(Gated() for _ in range(6)), nn.Linear(256, 256))


def deep() -> nn.Module:
    return nn.Sequential(nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(), nn.Conv2d(256, 256, 3, 1, 1))


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(192, 3, 768, 0.0, batch_first=True)


def head() -> nn.Module:
    """Linear layers in INT8, the last ReLU read by a layer in float."""
    return nn.Sequential(nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def channel_multiple() -> tuple[nn.Module, Tensor]:
    return Stem(), torch.randn(1, 3, 224, 224)


def matrix_units() -> tuple[nn.Module, Tensor]:
    return deep(), torch.randn(1, 256, 14, 14)


def split_products() -> tuple[nn.Module, Tensor]:
    return attention(), torch.randn(1, 197, 192)


CASES: dict[FileFeature, Callable[[], tuple[nn.Module, Tensor]]] = {
    FileFeature.CHANNEL_MULTIPLE: channel_multiple,
    FileFeature.MATRIX_UNITS: matrix_units,
    FileFeature.SPLIT_PRODUCTS: split_products,
}


@contextmanager
def without(feature: FileFeature) -> Any:
    """Inside the block ONNX Runtime requires everything else."""
    old = stored_tensors.ENGINES
    engine = ENGINES["ort"]
    stored_tensors.ENGINES = {
        "ort": replace(engine, requirements=tuple(entry for entry in engine.requirements if entry.feature is not feature))
    }
    try:
        yield
    finally:
        stored_tensors.ENGINES = old


@contextmanager
def norms(target: str, wanted: bool) -> Any:
    """Inside the block batch norms of their own are planned in INT8, or not."""
    old = targets.TARGETS
    planner.TARGETS = {**old, target: replace(old[target], norms=wanted)}
    try:
        yield
    finally:
        planner.TARGETS = old


@contextmanager
def clamps(rounded: bool) -> Any:
    """Inside the block a ReLU after an INT8 layer belongs to it, and is rounded, or not."""
    old = Groups.ends_at
    if not rounded:
        Groups.ends_at = lambda *arguments: False  # type: ignore[method-assign]
    try:
        yield
    finally:
        Groups.ends_at = old  # type: ignore[method-assign]


@contextmanager
def sums(in_float: bool) -> Any:
    """Inside the block sums and products of floats that an INT8 layer reads are in float, or in INT8."""
    old = Int8Layers._is_worth_it
    if not in_float:
        Int8Layers._is_worth_it = lambda self, name, int8: any(one in int8 for one in self.connections.consumers(name))  # type: ignore[method-assign]
    try:
        yield
    finally:
        Int8Layers._is_worth_it = old  # type: ignore[method-assign]


def exported(model: nn.Module, x: Tensor, path: Path, target: str = "ort", tail: bool = False) -> None:
    settings = {"global_quantization_settings": {"skip_tail_quantization": tail}, "deployment_settings": {"target_framework": target}}
    quantized = cc.quantize(model.eval(), settings, (x,))
    quantized.calibrate([x])
    quantized.export(path, check=False, dynamic_batch=False)
    quantized.remove()


def session(path: Path, target: str) -> Callable[[np.ndarray], Any]:
    if target == "openvino":
        import openvino

        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        compiled = openvino.Core().compile_model(str(path), "CPU", hints)
        return lambda x: compiled(x)
    made = engine_session(str(path), intra_op_num_threads=1)
    return lambda x: made.run(None, {made.get_inputs()[0].name: x})


def compared(paths: list[Path], x: Tensor, target: str = "ort", turns: int = 15) -> list[float]:
    """Milliseconds of each file: medians over turns, in which the files are run one after the other."""
    runs, array = [session(path, target) for path in paths], x.numpy()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(turns):
        for run, found in zip(runs, times, strict=True):
            run(array)
            start = time.perf_counter()
            for _ in range(5):
                run(array)
            found.append((time.perf_counter() - start) / 5 * 1000)
    return [statistics.median(found) for found in times]


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "with.onnx", Path(folder) / "without.onnx"]
        if sys.argv[1:] == ["norms"]:
            for target in ("ort", "openvino"):
                model, x = Dense(), torch.randn(1, 3, 64, 64)
                for path, wanted in zip(paths, (True, False), strict=True):
                    with norms(target, wanted):
                        exported(model, x, path, target)
                print(f"norms in {target}: INT8 {{:.2f}} ms, float {{:.2f}} ms".format(*compared(paths, x, target)))
            return
        if sys.argv[1:] == ["clamps"]:
            for batch in (1, 64):
                model, x = head(), torch.randn(batch, 1024)
                for path, wanted in zip(paths, (True, False), strict=True):
                    with clamps(wanted):
                        exported(model, x, path, tail=True)
                print(f"clamps, batch {batch}: rounded {{:.3f}} ms, in float {{:.3f}} ms".format(*compared(paths, x)))
            return
        if sys.argv[1:] == ["sums"]:
            for length in (16, 128):
                model, x, decibels = language().eval(), torch.randn(1, length, 256), []
                expected = model(x).detach()
                for path, wanted in zip(paths, (True, False), strict=True):
                    with sums(wanted):
                        exported(model, x, path)
                    error = torch.from_numpy(session(path, "ort")(x.numpy())[0]) - expected
                    decibels.append(float(10 * torch.log10(expected.square().sum() / error.square().sum())))
                times = compared(paths, x)
                print(
                    f"sums, {length} tokens: in float {times[0]:.2f} ms, {decibels[0]:.1f} dB, in INT8 {times[1]:.2f} ms, {decibels[1]:.1f} dB"
                )
            return
        for feature, make in CASES.items():
            model, x = make()
            exported(model, x, paths[0])
            with without(feature):
                exported(model, x, paths[1])
            print(f"{feature.name}: with {{:.3f}} ms, without {{:.3f}} ms".format(*compared(paths, x)))


if __name__ == "__main__":
    main()
