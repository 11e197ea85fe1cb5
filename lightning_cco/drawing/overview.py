"""A picture of any network that fits a screen: modules as boxes from left to right, coloured by how much of them runs in INT8, the worst layer marked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pydot

from lightning_cco.drawing import node_label as html
from lightning_cco.drawing.draw import quoted
from lightning_cco.drawing.modules_view import Box, modules_view
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.names import last_parts, printable
from lightning_cco.number_format import badness, figure, is_above, per_cent
from lightning_cco.quantization.plan import QuantizationPlan

WIDTH, HEIGHT = 1400, 900
"""Pixels that a picture of it has at most."""
_MOST, _FEWEST = 11, 5  # boxes
_LABELS = (22, 16, 12)  # characters of a module's name: fewer where the fewest boxes are still too wide
_TITLE_LETTER, _MARK_LETTER = 8.6, 7.2
"""Points of a bold letter of DejaVu Sans, the widest of the usual fonts, at the sizes of `node_label`."""
_WIDEST = 1250  # points from the first box to the last: what is wider is shrunk to the width of a screen, and hard to read


def draw_overview(graph: LayerGraph, plan: QuantizationPlan, qs: Mapping[str, float] | None = None, title: str = "") -> pydot.Dot:
    """Draw modules, at most a dozen boxes for any network; fewer where long names would make the whole too wide to be read.

    A box is green if all of its multiplications are in INT8, yellow if none is, in between by their share, which its bar shows. Modules without
    multiplications count layers.

    Args:
        graph: The layers.
        plan: What runs in INT8.
        qs: Quantization Sensitivity by layer name; the largest is marked.
        title: First line.
    """
    measured = {name: float(value) for name, value in (qs or {}).items() if name in graph}
    worst = max(measured, key=lambda name: badness(measured[name]), default=None)
    for most, letters in [*((most, _LABELS[0]) for most in range(_MOST, _FEWEST, -1)), *((_FEWEST, letters) for letters in _LABELS)]:
        boxes, edges = modules_view(graph, lambda layer: plan.decisions[layer.name].quantized, most)
        if _length(boxes, edges, worst, letters) <= _WIDEST:
            break
    dot = pydot.Dot("overview", graph_type="digraph")
    dot.set_graph_defaults(
        rankdir="LR",
        bgcolor="white",
        pad="0.2",
        nodesep="0.2",
        ranksep="0.18",
        fontname=html.SANS,
        labelloc="t",
        labeljust="l",
    )
    dot.set_node_defaults(shape="plain", fontname=html.SANS, fontsize="13", fontcolor=html.TEXT)
    dot.set_edge_defaults(color="#6B7785", penwidth="1.1", arrowsize="0.6")
    dot.set("label", _legend(plan, measured, worst, title))
    for number, box in enumerate(boxes):
        label, tooltip = _box(graph, plan, box, measured, worst, letters)
        dot.add_node(pydot.Node(str(number), label=label, tooltip=quoted(tooltip)))
    for source, destination in edges:
        back: dict[str, Any] = {} if source < destination else {"constraint": "false", "style": "dotted"}
        dot.add_edge(pydot.Edge(str(source), str(destination), **back))
    return dot


def share_in_int8(graph: LayerGraph, plan: QuantizationPlan, names: Sequence[str]) -> float:
    """The part of the multiplications of some layers that is in INT8; of layers without any, the part of the layers. NaN without layers that count."""
    layers = [graph[name] for name in names if graph[name].kind != "output"]
    total = sum(layer.multiplications for layer in layers)
    if total:
        return sum(layer.multiplications for layer in layers if layer.name in plan.in_int8) / total
    counted = [layer.name for layer in layers if plan.counts(layer.name)]
    return sum(name in plan.in_int8 for name in counted) / len(counted) if counted else math.nan


def _length(boxes: Sequence[Box], edges: Sequence[tuple[int, int]], worst: str | None, letters: int) -> float:
    """About how many points the longest chain of boxes takes from left to right."""
    reach = [0.0] * len(boxes)
    before: dict[int, list[int]] = {}
    for source, destination in edges:
        if source < destination:
            before.setdefault(destination, []).append(source)
    for number, box in enumerate(boxes):
        marked = _MARK_LETTER * len(f"worst: {worst}") if worst in box.members else 0.0
        width = max(_TITLE_LETTER * len(_title(box.label, letters)), marked, 55.0) + 22  # and what is around it
        reach[number] = width + max((reach[source] + 14 for source in before.get(number, ())), default=0.0)
    return max(reach, default=0.0)


def _box(graph: LayerGraph, plan: QuantizationPlan, box: Box, qs: Mapping[str, float], worst: str | None, letters: int) -> tuple[str, str]:
    marked = _mark(plan, qs, worst) if worst in box.members and worst is not None else []
    if box.end:
        return html.node_label(box.label, "", "", marked, html.BLUE, border=4 if marked else 2), ", ".join(box.members)
    share = share_in_int8(graph, plan, box.members)
    paint = html.WHITE if math.isnan(share) else html.mixed(share)
    count = f"× {box.repeats} · " if box.repeats > 1 else ""
    rows = [html.text_row(f"{count}{len(box.members)} layers" if len(box.members) > 1 else graph[box.members[0]].kind, color=html.MUTED)]
    if not math.isnan(share):
        rows.append(html.percent_row(share))
    decisions = [plan.decisions[name] for name in box.members]
    bits = sorted({decision.weights_num_bits for decision in decisions if decision.weights_num_bits is not None})
    if bits:
        rows.append(html.text_row("W" + "/".join(map(str, bits)), bold=True))
    label = html.node_label(_title(box.label, letters), "", "", [*rows, *marked], paint, border=3 if marked else 1)
    return label, f"{box.label}\n{', '.join(box.members)}"


def _mark(plan: QuantizationPlan, qs: Mapping[str, float], worst: str) -> list[str]:
    """The rows of the box with the largest sensitivity."""
    limit = plan.settings.global_quantization_settings.quantization_sensitivity_threshold
    color = html.RED if is_above(qs[worst], limit) else html.TEXT
    return [html.text_row(text, color=color, bold=True) for text in (f"worst: {worst}", f"QS {figure(qs[worst], 3)}")]


def _title(label: str, letters: int) -> str:
    """The label of a box, short; of several modules the first and the last one."""
    return " … ".join(printable(last_parts(part, letters), letters) for part in label.split(" … "))


def _legend(plan: QuantizationPlan, qs: Mapping[str, float], worst: str | None, title: str) -> str:
    entries = [
        (html.BLUE, "input or output"),
        (html.GREEN, "all multiplications in INT8"),
        (html.MIXED, "some"),
        (html.YELLOW, "none"),
    ]
    cells = "".join(
        f'<TD>{html.swatch(paint)}</TD><TD ALIGN="LEFT">{html.font(text, size=11)}</TD><TD WIDTH="6"></TD>' for paint, text in entries
    )
    share = plan.share_of_multiplications
    lines = [] if math.isnan(share) else [f"{per_cent(share)} of the multiplications in INT8; W8: bits of the weights"]
    if worst is not None:
        lines.append(f"largest Quantization Sensitivity (QS): {figure(qs[worst], 3)} in {worst}, whose box has a thick border")
    rows = f'<TR><TD ALIGN="LEFT">{html.font(title, size=16, bold=True)}</TD></TR>' if title else ""
    rows += f'<TR><TD ALIGN="LEFT"><TABLE BORDER="0" CELLBORDER="0" CELLSPACING="2"><TR>{cells}</TR></TABLE></TD></TR>'
    rows += "".join(f'<TR><TD ALIGN="LEFT">{html.font(line, size=11, color=html.MUTED)}</TD></TR>' for line in lines)
    rows += '<TR><TD HEIGHT="10"></TD></TR>'
    return f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="2">{rows}</TABLE>>'
