"""Cost of a training step on a GPU, in mixed precision (bfloat16), eager and compiled, against the same step without quantization, and ModelOpt if installed.

Run: ``python benchmarks/gpu.py`` on a machine with an NVIDIA GPU: ResNet-50 and ViT-B on batches of 64 × 3 × 224 × 224. ``--smoke`` runs everything on any
device with small networks, to see that it works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from cases import IMAGENET, Batch, Case, Step, images, loss_of
from export_models import ResNet18, ViT
from measure import interleaved
from peers import TOOLS
from report import Table, parser, publish
from torch import Tensor, nn

from lightning_cco import quantize

OURS = ("frozen ranges", "moving average")
SMALL = (
    Case("small ResNet", partial(ResNet18, 8), images(32, 4)),
    Case("small ViT", partial(ViT, width=32, depth=2, heads=2, image=32), images(32, 4)),
)


@dataclass(frozen=True)
class Way:
    """How a step is run.

    Attributes:
        kind: ``float``, one of ours, or the name of another tool.
        compiled: Whether the network is compiled.
    """

    kind: str
    compiled: bool


def step_of(case: Case, way: Way, device: str) -> Step:
    """A training step under autocast, as Lightning's ``bf16-mixed`` runs it."""
    model, batch = case.model().to(device), on(case.batch(), device)
    with torch.autocast(device, torch.bfloat16):
        model = prepared(model, batch[0], way.kind)
    run: Callable[[Tensor], Tensor] = torch.compile(model, isolate_recompiles=True) if way.compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(run(batch[0]), batch[1])
        loss.backward()
        optimizer.step()

    return step


def prepared(model: nn.Module, inputs: Tensor, kind: str) -> nn.Module:
    if kind in OURS:
        quantized = quantize(model, None, (inputs[:2],))
        quantized.calibrate([(inputs,)])
        if kind == "frozen ranges":
            quantized.freeze_ranges()
    elif kind != "float":
        model = TOOLS[kind].prepare(model, inputs).train()
    return model


def on(batch: Batch, device: str) -> Batch:
    return batch[0].to(device), batch[1].to(device)


def measured(case: Case, compiled: bool, kinds: list[str], device: str, rounds: int) -> list[list[str]]:
    torch._dynamo.reset()
    steps, failures, waits = {}, {}, {}
    for kind in kinds:
        try:
            steps[kind] = step_of(case, Way(kind, compiled), device)
        except Exception as error:
            failures[kind] = f"fails: {type(error).__name__}: {error}".splitlines()[0][:120]
    for kind, step in list(steps.items()):
        start = time.perf_counter()
        try:
            step()
        except Exception as error:
            failures[kind] = f"fails: {type(error).__name__}: {error}".splitlines()[0][:120]
            del steps[kind]
        waits[kind] = time.perf_counter() - start
    found = interleaved(steps, rounds, warm_up=4)
    del steps
    memory = {kind: peak(case, Way(kind, compiled), device) for kind in found}
    return [
        [
            case.name,
            "compiled" if compiled else "eager",
            kind,
            f"{1e3 * found[kind].seconds:.1f}",
            str(found[kind]),
            f"{memory[kind] / memory['float']:.2f}" if memory["float"] else "",
            f"{waits[kind]:.1f}",
        ]
        if kind in found
        else [case.name, "compiled" if compiled else "eager", kind, "", failures[kind], "", ""]
        for kind in kinds
    ]


def peak(case: Case, way: Way, device: str) -> float:
    """Peak of the memory that PyTorch holds on the GPU in a step, in MiB; 0 where there is no GPU."""
    if device != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step = step_of(case, way, device)
    step()
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=21)
    arguments.add_argument("--tools", nargs="*", default=["ModelOpt"], choices=list(TOOLS))
    arguments.add_argument("--smoke", action="store_true", help="small networks on any device, to see that everything runs")
    options = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.smoke:
        sys.exit("No CUDA device is visible to PyTorch, so there is nothing to measure; `--smoke` tries the script on the CPU.")
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    publish(table(SMALL if options.smoke else IMAGENET, device, options), options)


def table(cases: tuple[Case, ...], device: str, options: argparse.Namespace) -> Table:
    kinds = ["float", *OURS, *options.tools]
    rows = [row for case in cases for compiled in (False, True) for row in measured(case, compiled, kinds, device, options.rounds)]
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    header = ["model", "mode", "training", "ms", "step ÷ float of the same mode", "memory ÷ float", "first step s"]
    return Table("gpu", f"What does a training step cost on a GPU ({name}, bf16-mixed)?", header, rows)


if __name__ == "__main__":
    main()
