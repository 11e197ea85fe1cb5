"""Time before the first step: capture, plan and insertion for large networks, and a plan for a graph of 20,000 layers.

Run: ``python benchmarks/set_up.py`` (less than a minute). A capture runs the network twice, in evaluation and in training mode; those two forwards are
measured apart and subtracted, since they are the network's own. Shortest of some rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import IMAGENET, Case
from measure import seconds
from report import Table, parser, publish
from torch import Tensor, nn

from lightning_cco import plan_quantization, quantize
from lightning_cco.graph.layer import Edge, Layer
from lightning_cco.graph.layer_graph import LayerGraph


class Residual(nn.Module):
    """A linear layer, a ReLU and a way around them: three layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(x))


def deep(layers: int, width: int = 64) -> nn.Module:
    return nn.Sequential(*(Residual(width) for _ in range(layers // 3)), nn.Linear(width, 10))


CASES = (
    *IMAGENET,
    Case("1,000 layers (residual, width 64)", lambda: deep(1_000), lambda: (torch.randn(8, 64), torch.zeros(8).long())),
    Case("5,000 layers (residual, width 64)", lambda: deep(5_000), lambda: (torch.randn(8, 64), torch.zeros(8).long())),
)


def measured(case: Case, rounds: int) -> list[str]:
    totals, forwards = [], []
    for _ in range(rounds):
        model, (inputs, _) = case.model(), case.batch()
        inputs = inputs[:2]
        with torch.no_grad():
            model(inputs)  # the first one loads kernels
        forwards.append(_seconds_of_two_forwards(model, inputs))
        totals.append(seconds(lambda: quantize(model, None, (inputs,))))  # noqa: B023
    # What comes once is no median: anything that ran beside it makes it longer, nothing makes it shorter.
    total, forward = min(totals), min(forwards)
    quantized = quantize(case.model(), None, (inputs,))
    layers = str(quantized.plan.counted)
    return [case.name, layers, str(len(quantized.plan.quantized)), f"{forward:.2f}", f"{total:.2f}", f"{total - forward:.2f}"]


def _seconds_of_two_forwards(model: nn.Module, inputs: Tensor) -> float:
    taken = 0.0
    for training in (False, True):
        model.train(training)
        with torch.no_grad():
            taken += seconds(lambda: model(inputs))
    return taken


def planned(count: int) -> list[str]:
    """A graph in residual pairs, as one of a network with that many layers would be; no network is run."""
    names = [f"conv_{i}" for i in range(count)]
    layers = [Layer(name, f"stage.{i // 20}.conv{i % 20}", "conv", weighted=i % 5 < 2) for i, name in enumerate(names)]
    edges = [Edge(names[i], names[j]) for i in range(count) for j in (i + 1, i + 2) if j < count]
    settings = {
        "layer_settings": [
            {"match": "conv_10", "skip_quantization": True, "skip_quantization_until": [f"conv_{count // 2}"]},
            {"match": "stage.*.conv3", "weights_num_bits": 4},
        ]
    }
    plans: dict[str, Callable[[], object]] = {
        "default recipe": lambda: plan_quantization(graph),
        "skip until and a glob": lambda: plan_quantization(graph, settings),
    }
    graph = LayerGraph([*layers, Layer("output_0", "", "output")], [*edges, Edge(names[-1], "output_0")])
    return [f"{count:,}", *(f"{seconds(plan):.2f}" for plan in plans.values())]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    header = ["network", "layers", "quantized", "two forwards s", "set-up s", "set-up beyond them s"]
    rows = [measured(case, options.rounds) for case in CASES]
    publish(Table("set-up", "How long do capture, plan and insertion take? (batch 2)", header, rows), options)
    header = ["layers", "plan by the default recipe s", "… with skip until and a glob s"]
    publish(Table("plan", "How long does a plan for many layers take?", header, [planned(count) for count in (2_000, 20_000)]), options)


if __name__ == "__main__":
    main()
