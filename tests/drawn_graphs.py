"""Layer graphs to draw, written down layer by layer."""

from __future__ import annotations

import re
from html import unescape
from types import SimpleNamespace
from typing import Any

import pygraphviz

from lightning_cco.graph.layer import Edge, Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.quantization.plan import LayerDecision


class Builder:
    """Writes graphs down layer by layer."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.edges: list[Edge] = []

    def add(self, kind: str, *sources: str, path: str = "", **attributes: object) -> str:
        count = sum(layer.kind == kind for layer in self.layers)
        name = f"{kind}_{count}" if count or kind in ("input", "output") else kind
        weighted = kind in ("conv", "linear")
        shapes = ((2, 8, 4, 4),)
        outputs = () if kind == "output" else shapes
        self.layers.append(
            Layer(
                name,
                path,
                kind,
                shapes * len(sources),
                outputs,
                attributes=attributes,
                parameters=(f"{path}.weight",) * weighted,
                weighted=weighted,
            )
        )
        self.edges += [Edge(source, name) for source in sources]
        return name

    def graph(self) -> LayerGraph:
        return LayerGraph(self.layers, self.edges)


def cnn() -> LayerGraph:
    b = Builder()
    x = b.add("conv", b.add("input"), path="stem.conv", kernel_size=(3, 3), stride=(2, 2))
    x = b.add("relu", x, path="stem")
    x = b.add("flatten", x)
    b.add("output", b.add("linear", x, path="head", out_features=10))
    b.add("dropout", path="unused")  # no edge
    return b.graph()


def transformer(blocks: int, odd: int | None = None) -> LayerGraph:
    """Blocks of 8 layers: query, key, value, a product, a projection, a residual sum, a feed-forward part; block ``odd`` differs."""
    b = Builder()
    mask = b.add("input")
    x = b.add("linear", b.add("input"), path="embed")
    for k in range(blocks):
        p = f"encoder.layer.{k}"
        q, key, v = (
            b.add("linear", x, path=f"{p}.attention.{part}", out_features=9 if k == odd else 8) for part in ("query", "key", "value")
        )
        y = b.add("attention", q, key, v, mask, path=f"{p}.attention")
        y = b.add("linear", y, path=f"{p}.attention.out")
        x = b.add("add", x, y, path=p)
        x = b.add("gelu", b.add("linear", x, path=f"{p}.mlp.fc"), path=f"{p}.mlp")
    b.add("output", b.add("linear", x, path="head"))
    return b.graph()


def plan_of(graph: LayerGraph, skipped: dict[str, str] | None = None, threshold: float | None = 10_000.0) -> Any:
    """A stand-in for a QuantizationPlan."""
    reasons = dict.fromkeys(graph.outputs, "output") | (skipped or {})
    decisions = {
        layer.name: LayerDecision(
            quantized=layer.name not in reasons,
            reason=reasons.get(layer.name),  # type: ignore[arg-type]
            detail=f"why {layer.name}" if layer.name in reasons else "",
            weights_num_bits=4 if layer.weighted and layer.name not in reasons else None,
            activations_num_bits=8,
        )
        for layer in graph
    }
    settings = SimpleNamespace(global_quantization_settings=SimpleNamespace(quantization_sensitivity_threshold=threshold))
    summary = "1 of 2 layers with weights run in INT8 in ort"
    quantized = {name for name, decision in decisions.items() if decision.quantized}
    return SimpleNamespace(decisions=decisions, settings=settings, boundaries=[], summary=summary, quantized=quantized, in_int8=quantized)


def labels(dot: Any) -> dict[str, str]:
    """HTML label of each node, read from the DOT text by Graphviz's own parser."""
    parsed = pygraphviz.AGraph(string=dot.to_string())
    return {str(node): node.attr["label"] for node in parsed.nodes()}


def words(label: str) -> str:
    """What is read in a label, on one line."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", label)).split())


def irregular(blocks: int, layers_each: int) -> LayerGraph:
    """A deep net in which no two layers are alike."""
    b = Builder()
    x = b.add("input")
    for k in range(blocks):
        for j in range(layers_each):
            x = b.add("conv", x, path=f"net.stage{k // 10}.block{k}.conv{j}", out_channels=1000 * k + j)
    b.add("output", x)
    return b.graph()


def flat(count: int) -> LayerGraph:
    b = Builder()
    x = b.add("input")
    for k in range(count):
        x = b.add("mul", x, by=k)
    b.add("output", x)
    return b.graph()
