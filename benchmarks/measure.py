"""How time and memory are measured: interleaved runs in one process, peaks in fresh processes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from cases import Step

WARM_UP = 2
"""Rounds that do not count: first use of kernels, memory that the allocator has yet to ask for."""


@dataclass(frozen=True)
class Timing:
    """What interleaved rounds gave for one of the steps.

    Attributes:
        seconds: Median.
        ratio: Median over the rounds of its time over the first step's time in the same round.
        low: Lower quartile of those ratios.
        high: Upper quartile.
    """

    seconds: float
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.low:.2f}–{self.high:.2f})"


def interleaved(steps: Mapping[str, Step], rounds: int, warm_up: int = WARM_UP) -> dict[str, Timing]:
    """Time steps against the first of them, in turns, so that whatever slows the machine down slows all of them.

    Args:
        steps: What to time by name; the first is what the others are compared with. Each round begins with another one.
        rounds: How often each is timed.
        warm_up: Rounds before those.
    """
    names = list(steps)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up + rounds):
        start = turn % len(names)
        for name in (*names[start:], *names[:start]):
            duration = seconds(steps[name])
            if turn >= warm_up:
                taken[name].append(duration)
    return {name: _timing(durations, taken[names[0]]) for name, durations in taken.items()}


def _timing(durations: list[float], base: list[float]) -> Timing:
    ratios = [duration / reference for duration, reference in zip(durations, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Timing(statistics.median(durations), middle, low, high)


def seconds(step: Step) -> float:
    """Wall time of one call; on a GPU until its work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def run_fresh(script: str, *arguments: str, for_memory: bool = False) -> str:
    """Run one of the scripts in a fresh process.

    Args:
        script: Its path.
        *arguments: Its command line.
        for_memory: Let the allocator give freed tensors back at once, so that what is resident is what is held. It costs time.

    Returns:
        The last line that it printed.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    if for_memory:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.splitlines()[-1]


def resident(field: str) -> int:
    """A memory figure of this process in KiB (Linux): ``VmRSS`` now, ``VmHWM`` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def load_kernels() -> None:
    """Load what is loaded on first use: packages, thread pools and kernels are no part of a model's memory."""
    torch._dynamo.reset()
    weight = torch.randn(3, 3, 3, 3, requires_grad=True)
    F.conv2d(torch.randn(1, 3, 8, 8), weight).sum().backward()


def peak_of(step: Step, before: int) -> float:
    """Peak memory of a step in this process in MiB, beyond what was resident before the model was built.

    Args:
        step: What to run, twice: what the first run leaves behind (gradients) belongs to the model.
        before: ``resident("VmRSS")`` before the model was built, after `load_kernels`.
    """
    step()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    step()
    return (resident("VmHWM") - before) / 1024
