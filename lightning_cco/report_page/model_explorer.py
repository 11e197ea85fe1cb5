"""The graph for Google's Model Explorer: what it opens as a file, and the figures of each node that it lays over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_cco.drawing.node_label import BLUE, GREEN, WHITE, YELLOW, Paint
from lightning_cco.names import printable

GRAPH = "layers"
"""The id of the one graph."""
_PAINTS: Mapping[str, Paint] = {"input": BLUE, "output": BLUE, "int8": GREEN, "packed": GREEN, "weight-only": YELLOW, "float": YELLOW}
_GRADIENT = [{"stop": 0, "bgColor": "#f0f6fc"}, {"stop": 0.5, "bgColor": "#85b2d9"}, {"stop": 1, "bgColor": "#c62828"}]


def model_explorer_graph(data: Mapping[str, Any]) -> dict[str, Any]:
    """A collection of one graph, as Model Explorer opens it from a ``.json`` file.

    Args:
        data: The content of ``report.json``.
    """
    names = [layer["name"] for layer in data["layers"]]
    into: dict[int, list[dict[str, str]]] = {}
    for source, destination in data["edges"]:
        edges = into.setdefault(destination, [])
        edges.append({"sourceNodeId": names[source], "sourceNodeOutputId": "0", "targetNodeInputId": str(len(edges))})
    nodes = [_node(layer, into.get(number, [])) for number, layer in enumerate(data["layers"])]
    return {"label": printable(data["title"] or "lightning_cco"), "graphs": [{"id": GRAPH, "nodes": nodes}]}


def _node(layer: Mapping[str, Any], edges: list[dict[str, str]]) -> dict[str, Any]:
    paint = _PAINTS.get(layer["runs"], WHITE)
    sensitivity = layer.get("sensitivity", {})
    told = {
        "kind": layer["kind"],
        "module": layer.get("path", ""),
        "runs": layer["runs"],
        "why": layer.get("reason", ""),
        "weights_num_bits": layer.get("weights_bits", ""),
        "output_num_bits": layer.get("output_bits", ""),
        "qs": sensitivity.get("qs", ""),
        "sqnr_db": sensitivity.get("sqnr_db", ""),
        "multiplications": layer.get("multiplications", "") or "",
        **layer.get("attributes", {}),
    }
    return {
        "id": layer["name"],
        "label": printable(layer["name"], 100),
        "namespace": "/".join(printable(part.replace("/", "_"), 100) for part in layer.get("path", "").split(".") if part),
        "attrs": [{"key": printable(key, 100), "value": printable(value, 300)} for key, value in told.items() if value != ""],
        "incomingEdges": edges,
        "outputsMetadata": [
            {"id": str(number), "attrs": [{"key": "shape", "value": "×".join(map(str, shape)) or "scalar"}]}
            for number, shape in enumerate(layer.get("outputs", []))
        ],
        "style": {"backgroundColor": paint.fill, "borderColor": paint.border},
    }


def model_explorer_figures(data: Mapping[str, Any]) -> dict[str, Any]:
    """The Quantization Sensitivity of each layer, as Model Explorer's *node data* from a file.

    Args:
        data: The content of ``report.json``.
    """
    measured = {layer["name"]: layer["sensitivity"]["qs"] for layer in data["layers"] if "sensitivity" in layer}
    results = {name: {"value": qs} for name, qs in measured.items() if not isinstance(qs, str)}
    return {GRAPH: {"name": "Quantization Sensitivity", "results": results, "gradient": _GRADIENT}}
