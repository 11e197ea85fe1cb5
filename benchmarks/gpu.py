"""Cost of a training step on a GPU, in mixed precision (bfloat16), eager and compiled, against the same step in float, and against other tools.

Run: ``make benchmark-gpu`` on a machine with an NVIDIA GPU: ResNet-50, ViT-B and a decoder of 124 million parameters, in 8 minutes, into ``RESULTS.md``. What
there was no time for says so in the table: eager steps come before compiled ones, and ours before other tools'. ``--smoke`` runs everything on any device with
small networks, to see that it works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from cases import IMAGENET, LANGUAGE, Batch, Case, images, language_model, loss_of, text
from export_models import ResNet18, ViT
from measure import interleaved
from peers import TOOLS, Tool
from report import Table, parser, publish, version
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.quantization.triton_calls import device_kernels_for

OURS = ("frozen ranges", "moving average")
TARGETS = {"eager": 1.15, "compiled": 1.05}
OTHERS = ["torch.ao FX", "torchao PT2E", "ModelOpt"]
SMALL = (
    Case("small ResNet", partial(ResNet18, 8), images(32, 4)),
    Case("small ViT", partial(ViT, width=32, depth=2, heads=2, image=32), images(32, 4)),
    Case("small decoder", partial(language_model, 128, 32, 2, 16, 2), text(2, 16)),
)


@dataclass(frozen=True)
class Run:
    """A training step that can be taken again and again.

    Attributes:
        step: Takes one, under autocast, as Lightning's ``bf16-mixed`` does.
        clear: Drops the gradients.
    """

    step: Callable[[], None]
    clear: Callable[[], None]


@dataclass(frozen=True)
class Clock:
    """When measuring ends.

    Attributes:
        end: In seconds of `time.monotonic`.
    """

    end: float

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def run_of(case: Case, kind: str, compiled: bool, device: str) -> Run:
    model, batch = case.model().to(device), on(case.batch(), device)
    with torch.autocast(device, torch.bfloat16):
        model = prepared(model, batch[0], kind)
    forward: Callable[[Tensor], Tensor] = torch.compile(model, isolate_recompiles=True) if compiled else model
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(forward(batch[0]), batch[1])
        loss.backward()
        optimizer.step()

    return Run(step, optimizer.zero_grad)


def prepared(model: nn.Module, inputs: Tensor, kind: str) -> nn.Module:
    if kind in OURS:
        quantized = quantize(model, None, (inputs[:2],))
        quantized.calibrate([(inputs,)])
        if kind == "frozen ranges":
            quantized.freeze_ranges()
    elif kind != "float":
        model = TOOLS[kind].prepare(model, inputs)
        if not isinstance(model, torch.fx.GraphModule) or not hasattr(model, "_exported_training"):
            model.train()
    return model


def on(batch: Batch, device: str) -> Batch:
    return batch[0].to(device), batch[1].to(device)


def measured(case: Case, compiled: bool, kinds: list[str], device: str, rounds: int, clock: Clock) -> list[list[str]]:
    """A row of the table for each way to train a network."""
    torch._dynamo.reset()
    runs: dict[str, Run] = {}
    said: dict[str, str] = {}
    waits: dict[str, float] = {}
    for kind in kinds:
        if kind in TOOLS and not installed(TOOLS[kind]):
            said[kind] = "not installed"
            continue
        # What the first step of the float network took says what the next one may take.
        if clock.left < 1.5 * max(waits.values(), default=0.0):
            said[kind] = "no time left"
            continue
        try:
            run = run_of(case, kind, compiled, device)
            start = time.perf_counter()
            run.step()
            synchronize(device)
            waits[kind], runs[kind] = time.perf_counter() - start, run
        except Exception as error:
            said[kind] = f"fails: {type(error).__name__}: {error}".splitlines()[0][:120]
    found, memory = {}, {}
    if "float" in runs:
        found = interleaved({kind: run.step for kind, run in runs.items()}, rounds, warm_up=4)
        memory = {kind: peak(run, device) for kind, run in runs.items()}
    runs.clear()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    mode = "compiled" if compiled else "eager"
    rows = []
    for kind in kinds:
        if kind not in found:
            rows.append([case.name, mode, kind, "", said.get(kind, "float was not measured"), "", ""])
            continue
        relative = f"{memory[kind] / memory['float']:.2f}" if memory["float"] else ""
        rows.append([case.name, mode, kind, f"{1e3 * found[kind].seconds:.1f}", str(found[kind]), relative, f"{waits[kind]:.1f}"])
    for row in rows:
        print(" | ".join(row), flush=True)
    return rows


def installed(tool: Tool) -> bool:
    module = {"nvidia-modelopt": "modelopt"}.get(tool.package, tool.package)
    return importlib.util.find_spec(module) is not None


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak(run: Run, device: str) -> float:
    """What a step needs on the GPU beside weights and quantizers, in MiB; 0 where there is no GPU."""
    if device != "cuda":
        return 0.0
    run.clear()
    synchronize(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run.step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--minutes", type=float, default=8.0, help="when measuring ends; what is left out says so in the table")
    arguments.add_argument("--tools", nargs="*", default=OTHERS, choices=list(TOOLS))
    arguments.add_argument("--smoke", action="store_true", help="small networks on any device, to see that everything runs")
    options = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.smoke:
        sys.exit("No CUDA device is visible to PyTorch, so there is nothing to measure; `--smoke` tries the script on the CPU.")
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    publish(table(SMALL if options.smoke else (*IMAGENET, LANGUAGE), device, options), options)


def table(cases: tuple[Case, ...], device: str, options: argparse.Namespace) -> Table:
    kinds, clock = ["float", *OURS, *options.tools], Clock(time.monotonic() + 60 * options.minutes)
    rows = [row for compiled in (False, True) for case in cases for row in measured(case, compiled, kinds, device, options.rounds, clock)]
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    header = ["model", "mode", "training", "ms", "step ÷ float of the same mode", "memory of a step ÷ float", "first step s"]
    kernels = device == "cuda" and device_kernels_for(torch.ones(1, device=device)) is not None
    notes = [
        f"Targets: {TARGETS['eager']} eager, {TARGETS['compiled']} compiled. Eager quantizers ran "
        f"{'by the Triton kernels' if kernels else 'by torch operations, without Triton kernels'}.",
        "\n".join(f"- {TOOLS[tool].name} ({version(TOOLS[tool].package)}) leaves out: {TOOLS[tool].leaves_out}." for tool in options.tools),
    ]
    return Table("gpu", f"What does a training step cost on a GPU ({name}, bf16-mixed)?", header, rows, [note for note in notes if note])


if __name__ == "__main__":
    main()
