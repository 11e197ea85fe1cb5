"""Cost of a training step with fake-quantization: time and peak memory against the same step in float.

Run: ``python benchmarks/qat_step.py`` (a few minutes; each time ratio is the median of interleaved pairs in one process, each memory ratio that of
two fresh processes)
"""

from __future__ import annotations

import argparse
import os
import platform
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

from lightning_cco import quantize
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


def ratio(step: Step, float_step: Step, pairs: int) -> tuple[float, float]:
    """Median of QAT over float, and median float seconds."""
    ratios, floats = [], []
    for turn in range(pairs + 2):
        taken, base = seconds(step), seconds(float_step)
        if turn >= 2:
            ratios.append(taken / base)
            floats.append(base)
    return statistics.median(ratios), statistics.median(floats)


def measure(name: str, pairs: int) -> list[str]:
    float_model, float_step, x = prepare(name)
    model, step, _ = prepare(name)
    start = time.perf_counter()
    quantized = quantize(model, None, (x,))
    setup = time.perf_counter() - start
    quantized.calibrate([(x,)])
    quantized.freeze_ranges()
    frozen, base = ratio(step, float_step, pairs)
    quantized.unfreeze_ranges()
    moving, _ = ratio(step, float_step, pairs)
    model.eval(), float_model.eval()
    with torch.no_grad():
        forward, _ = ratio(lambda: model(x), lambda: float_model(x), pairs)
        local, _ = ratio(lambda: quantized.sensitivity([(x,)], modes=["local"]), lambda: float_model(x), 3)
        both, _ = ratio(lambda: quantized.sensitivity([(x,)]), lambda: float_model(x), 3)
    memory = [peak(name, kind) for kind in ("float", "quantized")]
    return [
        name,
        f"{1e3 * base:.0f}",
        f"{frozen:.2f}",
        f"{moving:.2f}",
        f"{forward:.2f}",
        f"{memory[1] / memory[0]:.2f}",
        f"{local:.1f}",
        f"{both:.1f}",
        f"{setup:.1f}",
    ]


def peak(name: str, kind: str) -> float:
    """Peak memory of a step in a fresh process, beyond what the interpreter and its packages take, in MiB."""
    # A fixed threshold makes the allocator give freed tensors back, so that what is resident is what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, __file__, "--peak", name, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.splitlines()[-1])


def print_peak(name: str, kind: str) -> None:
    # Packages, thread pools and kernels that are loaded on first use are no part of the model.
    torch._dynamo.reset()
    F.conv2d(torch.randn(1, 3, 8, 8), torch.randn(3, 3, 3, 3))
    before = resident("VmRSS")
    model, step, x = prepare(name)
    if kind == "quantized":
        quantized = quantize(model, None, (x[:1],))
        quantized.calibrate([(x[:1],)])
        quantized.freeze_ranges()
    model.train()
    step()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    step()
    print((resident("VmHWM") - before) / 1024)


def resident(field: str) -> int:
    """A memory figure of this process in KiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


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
        "both QS in forwards",
        "set-up s",
    ]
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}; ratios to float\n")
    print(markdown_table(header, rows))
    return None


if __name__ == "__main__":
    main()
