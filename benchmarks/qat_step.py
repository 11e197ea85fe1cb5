"""Cost of a training step with fake-quantization against the same step in float: eager, compiled, without gradients, and in memory.

Run: ``python benchmarks/qat_step.py`` (a few minutes). Each time ratio is the median of interleaved rounds in one process, in brackets the quartiles;
each memory ratio is that of two fresh processes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from cases import CASES, Case, Step, chosen, loss_of, training_step
from measure import Timing, interleaved, load_kernels, peak_of, resident, run_fresh
from report import Table, parser, publish
from torch import Tensor, nn

from lightning_cco import QuantizedModel, quantize
from lightning_cco.distillation.terms import class_divergence

KINDS = ("float", "frozen", "moving average")
BITS = {"W8A8": 8, "W4A4": 4, "W2A2": 2}


def prepared(case: Case, kind: str) -> tuple[nn.Module, QuantizedModel | None]:
    """The network of a case, quantized and calibrated unless it is to stay float."""
    model = case.model()
    if kind == "float":
        return model, None
    inputs, _ = case.batch()
    bits = BITS.get(kind, 8)
    settings = {"global_quantization_settings": {"weights_num_bits": bits, "activations_num_bits": bits}}
    quantized = quantize(model, settings, (inputs[:2],))
    quantized.calibrate([(inputs[:2],)])
    if kind == "frozen":
        quantized.freeze_ranges()
    return model, quantized


def step_of(case: Case, kind: str, wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda model: model) -> Step:
    """A training step of a case, with the network wrapped (compiled)."""
    model, _ = prepared(case, kind)
    return training_step(wrap(model), list(model.parameters()), case.batch())


def eager(case: Case, rounds: int) -> list[str]:
    found = interleaved({kind: step_of(case, kind) for kind in KINDS}, rounds)
    return [case.name, *_cells(found)]


def few_bits(case: Case, rounds: int) -> list[str]:
    found = interleaved({kind: step_of(case, kind) for kind in ("float", *BITS)}, rounds)
    return [case.name, f"{1e3 * found['float'].seconds:.0f}", *(str(found[kind]) for kind in BITS)]


def distilled(case: Case, rounds: int) -> list[str]:
    """The student's step with a teacher's forward without gradients and the divergence of their outputs."""
    inputs, targets = case.batch()
    model, _ = prepared(case, "W4A4")
    teacher = prepared(case, "float")[0].eval()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        scores = model(inputs)
        with torch.no_grad():
            taught = teacher(inputs)
        (0.3 * loss_of(scores, targets) + 0.7 * class_divergence(scores, taught, -1, 2.0)).backward()
        optimizer.step()

    found = interleaved({"float": step_of(case, "float"), "W4A4": step_of(case, "W4A4"), "distilled": step}, rounds)
    return [case.name, f"{1e3 * found['float'].seconds:.0f}", str(found["W4A4"]), str(found["distilled"])]


def compiled(case: Case, rounds: int) -> list[str]:
    torch._dynamo.reset()
    steps, waits = {}, []
    for kind in KINDS:
        # All three share the code of the same class: each keeps its compiled code to itself, as if it were alone.
        steps[kind] = step_of(case, kind, partial(torch.compile, isolate_recompiles=True))
    # Quantizing drops compiled code: nothing is compiled before all are quantized.
    for step in steps.values():
        start = time.perf_counter()
        step()
        waits.append(time.perf_counter() - start)
    found = interleaved(steps, rounds, warm_up=4)
    torch._dynamo.reset()
    return [case.name, *_cells(found), *(f"{wait:.0f}" for wait in waits)]


def _cells(found: dict[str, Timing]) -> list[str]:
    return [f"{1e3 * found['float'].seconds:.0f}", str(found["frozen"]), str(found["moving average"])]


def forward(case: Case, rounds: int) -> list[str]:
    """Forward in evaluation mode without gradients, and Quantization Sensitivity in such forwards."""
    models = {kind: prepared(case, kind) for kind in ("float", "frozen")}
    inputs, _ = case.batch()
    quantized = models["frozen"][1]
    assert quantized is not None
    for model, _ in models.values():
        model.eval()
    with torch.no_grad():
        steps: dict[str, Step] = {kind: (lambda model=model: model(inputs)) for kind, (model, _) in models.items()}  # type: ignore[misc]
        found = interleaved(steps, rounds)
        steps = {
            "float": steps["float"],
            "local": lambda: quantized.sensitivity([(inputs,)], modes=["local"]),  # type: ignore[dict-item]
            "both": lambda: quantized.sensitivity([(inputs,)]),  # type: ignore[dict-item]
        }
        measured = interleaved(steps, max(3, rounds // 2), warm_up=1)
    return [
        case.name,
        f"{1e3 * found['float'].seconds:.0f}",
        str(found["frozen"]),
        f"{measured['local'].ratio:.1f}",
        f"{measured['both'].ratio:.1f}",
    ]


def memory(case: Case, rounds: int) -> list[str]:
    peaks = [float(run_fresh(__file__, "--peak", case.name, kind, for_memory=True)) for kind in KINDS]
    return [case.name, f"{peaks[0]:.0f}", *(f"{peak / peaks[0]:.2f}" for peak in peaks[1:])]


def print_peak(name: str, kind: str) -> None:
    load_kernels()
    before = resident("VmRSS")
    print(peak_of(step_of(CASES[name], kind), before))


QUESTIONS: dict[str, tuple[str, list[str], Callable[[Case, int], list[str]]]] = {
    "eager": ("What does a training step cost?", ["model", "float ms", "frozen ranges", "moving average"], eager),
    "few_bits": (
        "What does a training step cost at few bits, by default: a search for each weight's scales, and ranges that are frozen?",
        ["model", "float ms", *BITS],
        few_bits,
    ),
    "distilled": (
        "What does distillation add to a training step?",
        ["model", "float ms", "W4A4", "W4A4 and distillation"],
        distilled,
    ),
    "compiled": (
        "What does a compiled training step cost, against the compiled float step?",
        ["model", "float ms", "frozen ranges", "moving average", "compiling float s", "… frozen s", "… moving s"],
        compiled,
    ),
    "memory": ("How much memory does a training step take?", ["model", "float MiB", "frozen ranges", "moving average"], memory),
    "forward": (
        "What do a forward without gradients and the Quantization Sensitivity of a batch cost, in float forwards?",
        ["model", "float ms", "quantized forward", "local QS", "local and accumulated QS"],
        forward,
    ),
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="*", default=[], help="parts of the names of the cases")
    arguments.add_argument("--questions", nargs="*", default=list(QUESTIONS), choices=list(QUESTIONS))
    arguments.add_argument("--rounds", type=int, default=11)
    arguments.add_argument("--peak", nargs=2, metavar=("CASE", "KIND"), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        return print_peak(*options.peak)
    for question in options.questions:
        title, header, answer = QUESTIONS[question]
        rows = [answer(case, options.rounds) for case in chosen(options.models)]
        publish(Table(question, title, header, rows), options)
    return None


if __name__ == "__main__":
    main()
