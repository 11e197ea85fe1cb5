"""Which layer each node of a file comes from: noted on what a trace adds, read off the exporter's graph."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning_cco.compat.onnx_exporter import HANDED_ON, graph_being_traced, traced_text
from lightning_cco.export.onnx_passes import PRODUCTS

_MOST_FUSED = 4
"""How many operators of a file an engine puts together behind a product, at most, under the name of the last one."""
PAIR = "lightning_cco.quantizer"
"""Where it has, of a quantize operator, the name of its quantizer."""
LAYER = "lightning_cco.layer"
"""Where a traced node's ``custom`` metadata, which PyTorch hands on from graph to graph, has its layer's name."""


@contextmanager
def noting(layer: str) -> Iterator[None]:
    """Note the layer on every node that a running trace adds inside the block, unless it has one already."""
    with _noting(LAYER, layer):
        yield


@contextmanager
def noting_pair(name: str) -> Iterator[None]:
    """Note the name of its quantizer on the quantize operator that a running trace adds inside the block."""
    with _noting(PAIR, name):
        yield


def noted(node: Any, what: str) -> str:
    """What was noted on a node: its `LAYER` or its `PAIR`; empty: nothing."""
    return str(((node.meta.get(HANDED_ON) or {}) if node is not None else {}).get(what, ""))


@contextmanager
def _noting(what: str, name: str) -> Iterator[None]:
    graph = graph_being_traced()
    last = next(iter(reversed(graph.nodes)), None) if graph is not None else None
    yield
    if graph is None:
        return
    for node in reversed(graph.nodes):
        if node is last:
            return
        node.meta[HANDED_ON] = {what: name, **(node.meta.get(HANDED_ON) or {})}


def layers_of_nodes(graph: Any, exported: Any) -> dict[str, str]:
    """Layer of each node of an exporter's graph, by the node's name; nodes that belong to none are left out.

    Args:
        graph: The `onnx_ir.Graph`, its metadata still on it.
        exported: The `torch.export.ExportedProgram` that it was made of.
    """
    traced = {node.name: noted(node, LAYER) for node in exported.graph.nodes}
    found = {}
    for node in graph:
        name = re.match(r"%?(\w+)", traced_text(node))
        layer = noted(node.meta.get("node"), LAYER) or (traced.get(name.group(1), "") if name else "")
        if layer:
            found[node.name] = layer
    return found


class NodeLayers:
    """Finds the layer of a node of an engine's optimized graph: fused nodes keep the name of one of their nodes, or of what the last one makes.

    Args:
        written: The file that the graph was made of.
        layers: Layer of each of its nodes, by name.
        optimized: The engine's graph.
    """

    def __init__(self, written: Any, layers: Mapping[str, str], optimized: Any) -> None:
        self._by_name = dict(layers)
        self._by_value = {value: layers[n.name] for n in written.graph.node if n.name in layers for value in n.output}
        self._makers = {value: node for node in written.graph.node for value in node.output}
        self._seen: dict[str, str] = {}
        self._note_inlined(optimized)

    def product_of(self, node: Any) -> str:
        """The layer whose product a node computes; it may be called after what was put together with the product, such as an addition. Empty: none is known."""
        values = list(node.output)
        for _ in range(_MOST_FUSED):
            makers = [self._makers[value] for value in values if value in self._makers]
            if product := next((maker for maker in makers if maker.op_type in PRODUCTS), None):
                return self._by_name.get(product.name, "")
            values = [value for maker in makers for value in maker.input]
        return ""

    def _note_inlined(self, optimized: Any) -> None:
        """Of an operator that ONNX Runtime takes apart (HardSwish), only the last part may make a value with a name in the file; its reader names all."""
        nameless = {value for node in optimized.node if not node.name for value in node.output}
        for node in reversed(optimized.node):
            layer = next((self._by_value[value] for value in node.output if value in self._by_value), self._by_name.get(node.name, ""))
            if layer:
                for value in nameless.intersection(node.input):
                    self._by_value.setdefault(value, layer)

    def of(self, node: Any) -> str:
        """The layer; of a node that belongs to none, that of what it reads; empty if nothing is known of that either. Nodes come in order."""
        names = [form for name in (*node.output, node.name, node.name.partition("/")[0]) for form in _plain(name)]
        found = next((known[name] for name in names for known in (self._by_value, self._by_name) if name in known), "")
        found = found or next((self._seen[value] for value in node.input if value in self._seen), "")
        if found:
            self._seen.update(dict.fromkeys(node.output, found))
        return found


def _plain(name: str) -> tuple[str, ...]:
    """The name of a value or a node, and without what the engine puts after it."""
    return name, re.sub(r"(_q_to_dq|_dq_to_q|/duplicated|_nchwc|_token_\d+)+$", "", name)
