"""Networks and the reports of them, for the tests of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_cco import QuantizedModel, quantize
from lightning_cco.graph.layer import Edge, Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.level_use import LevelWatch
from lightning_cco.report_page.data import RunState, report_data
from lightning_cco.report_page.facts import model_facts
from lightning_cco.report_page.page import page

HOSTILE = (
    "<script>globalThis.harmed = 1</script>",
    "</script><img src=x onerror=globalThis.harmed=1>",
    "${HOME}",
    "a: b # c",
    "\u202eevil\x1b",
)
"""Names of modules that would do something if they were taken for markup, for YAML or for an interpolation."""


class Residual(nn.Module):
    """Two branches and their sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


class Net(nn.Module):
    """A small residual network, with a linear layer behind."""

    def __init__(self, width: int = 8, blocks: int = 2, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU())
        self.blocks = nn.ModuleDict({name: Residual(width) for name in [*map(str, range(blocks)), *names]})
        self.hidden, self.head = nn.Linear(width, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks.values():
            x = block(x)
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


def quantized_net(settings: Any = None, names: tuple[str, ...] = (), blocks: int = 2) -> QuantizedModel:
    torch.manual_seed(0)
    x = torch.randn(4, 1, 8, 8)
    quantized = quantize(Net(blocks=blocks, names=names), settings, (x,))
    quantized.calibrate([x])
    return quantized


def state_of(quantized: QuantizedModel, losses: bool = True) -> RunState:
    """What a run knows after two epochs."""
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    watch = LevelWatch()
    levels = watch.measure(quantized, lambda: quantized.model(x))
    report = quantized.sensitivity([x])
    measured = quantized.loss_sensitivity([x]) if losses else None
    qs = {name: entry.qs for name, entry in report.main.items()}
    return RunState(
        plan=quantized.plan,
        epoch=1,
        step=20,
        metrics={"val_acc": 0.75, "lr": 0.1},
        original={"val_acc": 0.8},
        calibrated={"val_acc": 0.5},
        directions={"val_acc": "max"},
        extremes={"val_acc": {"lowest": 0.7, "lowest_epoch": 0, "highest": 0.75, "highest_epoch": 1}},
        metric_epochs=[(0, {"val_acc": 0.7, "lr": 0.1}), (1, {"val_acc": 0.75, "lr": 0.1})],
        qs_epochs=[(0, {name: 2 * value for name, value in qs.items()}), (1, qs)],
        loss_epochs=[(1, measured.rises(quantized.plan))] if measured else [],
        report=report,
        losses=measured,
        levels=levels,
        views=watch.views,
        facts=model_facts(quantized),
    )


def write_page(folder: Path, state: RunState) -> Path:
    path = folder / "report.html"
    path.write_text(page(report_data(state)), encoding="utf-8")
    return path


def long_graph(layers: int) -> LayerGraph:
    """Residual blocks in stages, without a model after them."""
    shape = (2, 16, 8, 8)
    made = [Layer("input_0", "", "input", output_shapes=(shape,), output_dtypes=("float32",))]
    edges, last, count = [], "input_0", 0
    while len(made) < layers - 2:
        first, block = last, count // 6
        for kind in ("conv", "batch_norm", "relu", "conv", "batch_norm", "add"):
            name = f"{kind}_{count}"
            count += 1
            path = f"stages.{block // 30}.{block % 30}" + ("" if kind == "add" else f".{kind}{count % 6}")
            weight = {"weighted": True, "parameters": (f"{path}.weight",), "multiplications": 100} if kind == "conv" else {}
            made.append(Layer(name, path, kind, (shape,), (shape,), ("float32",), **weight))
            edges.append(Edge(last, name))
            edges += [Edge(first, name, 0, 1)] if kind == "add" else []
            last = name
    made.append(Layer("output_0", "", "output", (shape,)))
    return LayerGraph(made, [*edges, Edge(last, "output_0")])
