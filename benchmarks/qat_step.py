"""Cost of a training step with fake-quantization: time and peak memory against the same step in float.

Run: ``python benchmarks/qat_step.py`` (a few minutes; each time ratio is the median of interleaved pairs in one process, each memory ratio that of
two fresh processes)
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from export_models import Decoder, MobileNetV2, ResNet18, ViT

from lightning_cco import QuantizedModel, quantize
from lightning_cco.monitoring.tables import markdown_table

Step = Callable[[], None]


def images(size: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))


def text(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 128, (batch, length + 1))
    return tokens[:, :-1], tokens[:, 1:]


CASES: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], tuple[torch.Tensor, torch.Tensor]]]] = {
    "ResNet-18 16×3×96×96": (ResNet18, lambda: images(96, 16)),
    "MobileNetV2 16×3×96×96": (MobileNetV2, lambda: images(96, 16)),
    "ViT-tiny 8×3×224×224": (ViT, lambda: images(224, 8)),
    "6-layer character transformer 16×128": (lambda: Decoder(128, 128, 6, 128), lambda: text(16, 128)),
}


def prepare(name: str) -> tuple[torch.nn.Module, Step, torch.Tensor]:
    torch.manual_seed(0)
    make, data = CASES[name]
    model, (x, y) = make().train(), data()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()

    return model, step, x


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def ratio(step: Step, quantized: QuantizedModel, pairs: int) -> tuple[float, float]:
    """Median of QAT over float, and median float seconds."""
    ratios, floats = [], []
    for turn in range(pairs + 2):
        taken = seconds(step)
        with quantized.disabled():
            base = seconds(step)
        if turn >= 2:
            ratios.append(taken / base)
            floats.append(base)
    return statistics.median(ratios), statistics.median(floats)


def measure(name: str, pairs: int) -> list[str]:
    model, step, x = prepare(name)
    start = time.perf_counter()
    quantized = quantize(model, None, (x,))
    setup = time.perf_counter() - start
    quantized.calibrate([(x,)])
    quantized.freeze_ranges()
    frozen, base = ratio(step, quantized, pairs)
    quantized.unfreeze_ranges()
    moving, _ = ratio(step, quantized, pairs)
    model.eval()
    with torch.no_grad():
        forward, _ = ratio(lambda: model(x), quantized, pairs)
        start = time.perf_counter()
        quantized.sensitivity([(x,)], modes=["local"])
        local = time.perf_counter() - start
        with quantized.disabled():
            local /= min(seconds(lambda: model(x)) for _ in range(3))
    memory = [peak(name, kind) for kind in ("float", "quantized")]
    return [
        name,
        f"{1e3 * base:.0f}",
        f"{frozen:.2f}",
        f"{moving:.2f}",
        f"{forward:.2f}",
        f"{memory[1] / memory[0]:.2f}",
        f"{local:.1f}",
        f"{setup:.1f}",
    ]


def peak(name: str, kind: str) -> float:
    """Growth of the peak resident memory over a step, in a fresh process."""
    done = subprocess.run([sys.executable, __file__, "--peak", name, kind], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def print_peak(name: str, kind: str) -> None:
    model, step, x = prepare(name)
    if kind == "quantized":
        small = x[:1]
        quantized = quantize(model, None, (small,))
        quantized.calibrate([(small,)])
        quantized.freeze_ranges()
    model.train()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(CASES), help="parts of the names of the cases")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.peak:
        return print_peak(*options.peak)
    rows = [measure(name, options.pairs) for name in CASES if any(part in name for part in options.models)]
    header = [
        "model",
        "float ms",
        "step, frozen",
        "step, moving average",
        "forward, no grad",
        "peak memory",
        "local QS in forwards",
        "set-up s",
    ]
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}; ratios to float\n")
    print(markdown_table(header, rows))
    return None


if __name__ == "__main__":
    main()
