"""Where the time of a training step with fake-quantization goes: by taking its parts away one by one, and by PyTorch's operators.

Run: ``python benchmarks/profile_step.py`` (two minutes). ``--write`` puts the tables into ``docs/performance.md``.

The parts are steps on top of each other: the hooks alone, then weights, then activations with fixed ranges, then ranges that move. Each row of the first table
is the difference between one of them and the one before, in the same round; forward and backward are timed apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cases import Batch, Case, chosen, loss_of
from qat_step import prepared
from report import Table, parser, publish
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lightning_cco.quantization.phases import Phase

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
PARTS = {
    "float": "the float step",
    "hooks": "hooks and dispatch: each torch call passes the function mode",
    "weights": "weights: scales, rounding",
    "frozen": "activations: rounding; their gradient",
    "moving average": "ranges: statistics and the moving average",
}
Phases = tuple[float, float, float]


def without_activations(x: Tensor, clamp: tuple[float, float] | None = None, inplace: bool = False, **_: Any) -> Tensor:
    """An activation quantizer that rounds nothing; what is left is the activation function that it stands for."""
    if clamp is None:
        return x
    return F.relu(x, inplace) if clamp == (0.0, float("inf")) else F.hardtanh(x, *clamp, inplace)


def network(case: Case, part: str) -> nn.Module:
    model, quantized = prepared(case, part if part in ("float", "moving average") else "frozen")
    if quantized is not None and part == "hooks":
        quantized.runtime.phase = Phase.PASS
    if quantized is not None and part == "weights":
        for quantizer in quantized.activations.values():
            quantizer.forward = without_activations  # type: ignore[method-assign]
    return model


def phases(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Phases:
    """Seconds of forward, backward and optimizer step."""
    optimizer.zero_grad()
    times = [time.perf_counter()]
    loss = loss_of(model(batch[0]), batch[1])
    times.append(time.perf_counter())
    loss.backward()
    times.append(time.perf_counter())
    optimizer.step()
    times.append(time.perf_counter())
    return times[1] - times[0], times[2] - times[1], times[3] - times[2]


def by_parts(case: Case, rounds: int) -> list[list[str]]:
    models = {part: network(case, part) for part in PARTS}
    optimizers = {part: torch.optim.SGD(model.parameters(), 1e-3) for part, model in models.items()}
    batch = case.batch()
    taken: dict[str, list[Phases]] = {part: [] for part in PARTS}
    for turn in range(rounds + 2):
        for part, model in models.items():
            found = phases(model, optimizers[part], batch)
            if turn >= 2:
                taken[part].append(found)
    whole = statistics.median(sum(found) for found in taken["float"])
    rows, before = [], ""
    for part, words in PARTS.items():
        forward = _median(taken, part, before, lambda found: found[0])
        backward = _median(taken, part, before, lambda found: found[1])
        total = _median(taken, part, before, sum)
        rows.append([case.name, words, f"{1e3 * forward:.1f}", f"{1e3 * backward:.1f}", f"{1e3 * total:.1f}", f"{100 * total / whole:.1f}"])
        before = part
    total = statistics.median(sum(found) for found in taken["moving average"])
    rows.append([case.name, "all of it", "", "", f"{1e3 * total:.1f}", f"{100 * total / whole:.1f}"])
    return rows


def _median(taken: dict[str, list[Phases]], part: str, before: str, of: Callable[[Phases], float]) -> float:
    """Median over the rounds of what a part adds to the one before."""
    if not before:
        return statistics.median(of(found) for found in taken[part])
    return statistics.median(of(more) - of(less) for more, less in zip(taken[part], taken[before], strict=True))


def operators(case: Case, part: str, rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds and calls per step of each of PyTorch's operators, without what it calls: medians over steps that are profiled one by one."""
    model, batch = network(case, part), case.batch()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    phases(model, optimizer, batch)
    steps: list[dict[str, tuple[float, int]]] = []
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            phases(model, optimizer, batch)
        steps.append({event.key: (event.self_cpu_time_total / 1e3, event.count) for event in profiled.key_averages()})
    names = {name for step in steps for name in step}
    return {name: tuple(statistics.median(step.get(name, (0.0, 0))[i] for step in steps) for i in (0, 1)) for name in names}


def by_operators(case: Case, rounds: int, most: int) -> list[list[str]]:
    floats, ours = operators(case, "float", rounds), operators(case, "moving average", rounds)
    more = {name: ours.get(name, (0.0, 0.0))[0] - floats.get(name, (0.0, 0.0))[0] for name in ours | floats}
    rows = []
    for name in sorted(more, key=lambda name: -abs(more[name]))[:most]:
        (base, base_calls), (now, calls) = floats.get(name, (0.0, 0.0)), ours.get(name, (0.0, 0.0))
        rows.append([case.name, f"`{name}`", f"{base:.1f}", f"{now:.1f}", f"{more[name]:+.1f}", f"{base_calls:.0f} → {calls:.0f}"])
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="*", default=[], help="parts of the names of the cases")
    arguments.add_argument("--rounds", type=int, default=11)
    arguments.add_argument("--operators", type=int, default=8, help="how many of them to show for each model")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    cases = chosen(options.models)
    rows = [row for case in cases for row in by_parts(case, options.rounds)]
    header = ["model", "part", "forward ms", "backward ms", "step ms", "% of the float step"]
    publish(Table("parts", "What each part adds", header, rows), options, PAGE)
    rows = [row for case in cases for row in by_operators(case, 7, options.operators)]
    header = ["model", "operator", "float ms", "quantized ms", "difference", "calls"]
    notes = ["Time within the operator itself, with the profiler on. What Python does between operators is in none of them."]
    publish(Table("operators", "The operators whose time changes most", header, rows, notes), options, PAGE)


if __name__ == "__main__":
    main()
