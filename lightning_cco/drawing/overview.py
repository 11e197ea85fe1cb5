"""A picture of any network that fits a screen: modules as boxes from left to right, coloured by how much of them runs in INT8, the worst layer marked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pydot

from lightning_cco.drawing import node_label as html
from lightning_cco.drawing.draw import hint
from lightning_cco.drawing.modules_view import Box
from lightning_cco.drawing.overview_layout import Layout, laid_out
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.names import last_parts, printable
from lightning_cco.number_format import badness, figure, is_above
from lightning_cco.quantization.plan import QuantizationPlan

WIDTH, HEIGHT = 1400, 900
"""Pixels that a picture of it has at most."""
_LINE = 100  # characters in a line below the legend
_TITLE_LETTER, _MARK_LETTER = 8.6, 7.2
"""Points of a bold letter of DejaVu Sans, the widest of the usual fonts, at the sizes of `node_label`."""


def draw_overview(graph: LayerGraph, plan: QuantizationPlan, qs: Mapping[str, float] | None = None, title: str = "") -> pydot.Dot:
    """Draw modules: about a dozen boxes for any network, in rows where one line would be too wide to be read.

    A box is green if all of its multiplications are in INT8, yellow if none is, in between by their share, which its bar shows; white if it has none.

    Args:
        graph: The layers.
        plan: What runs in INT8.
        qs: Quantization Sensitivity by layer name; the largest is marked.
        title: First line.
    """
    measured = {name: float(value) for name, value in (qs or {}).items() if name in graph}
    worst = max(measured, key=lambda name: badness(measured[name]), default=None)
    layout = laid_out(graph, lambda layer: plan.decisions[layer.name].quantized, lambda box, letters: _width(box, worst, letters))
    dot = pydot.Dot("overview", graph_type="digraph")
    dot.set_graph_defaults(
        rankdir="TB" if layout.rows else "LR",
        bgcolor="white",
        pad="0.2",
        nodesep="0.25" if layout.rows else "0.2",
        ranksep="0.5" if layout.rows else "0.18",
        fontname=html.SANS,
        labelloc="t",
        labeljust="l",
    )
    dot.set_node_defaults(shape="plain", fontname=html.SANS, fontsize="13", fontcolor=html.TEXT)
    dot.set_edge_defaults(color="#6B7785", penwidth="1.1", arrowsize="0.6")
    dot.set("label", _legend(plan, measured, worst, title))
    for number, box in enumerate(layout.boxes):
        label, tooltip = _box(graph, plan, box, measured, worst, layout.letters)
        dot.add_node(pydot.Node(str(number), label=label, tooltip=hint(tooltip)))
    _connect(dot, layout)
    return dot


def _connect(dot: pydot.Dot, layout: Layout) -> None:
    """Add the edges; and what holds the rows: invisible edges between neighbours in one, and from the start of one to that of the next."""
    row_of = {number: row for row, numbers in enumerate(layout.rows) for number in numbers}
    for source, destination in layout.edges:
        how: dict[str, Any] = {}
        if source > destination:
            how = {"constraint": "false", "style": "dotted"}
        elif row_of and row_of[source] != row_of[destination]:
            how = {"constraint": "false"}
        dot.add_edge(pydot.Edge(str(source), str(destination), **how))
    for numbers in layout.rows:
        row = pydot.Subgraph(rank="same")
        for number in numbers:
            row.add_node(pydot.Node(str(number)))
        for pair in pairwise(numbers):
            if pair not in layout.edges:
                row.add_edge(pydot.Edge(str(pair[0]), str(pair[1]), style="invis"))
        dot.add_subgraph(row)
    starts = [numbers[0] for numbers in layout.rows]
    for pair in pairwise(starts):
        dot.add_edge(pydot.Edge(str(pair[0]), str(pair[1]), style="invis", weight="100", tailport="sw", headport="nw"))


def share_in_int8(graph: LayerGraph, plan: QuantizationPlan, names: Sequence[str]) -> float:
    """The part of the multiplications of some layers that is in INT8; NaN if they have none."""
    layers = [graph[name] for name in names]
    total = sum(layer.multiplications for layer in layers)
    return sum(layer.multiplications for layer in layers if layer.name in plan.in_int8) / total if total else math.nan


def _width(box: Box, worst: str | None, letters: int) -> float:
    """About how many points a box takes."""
    marked = _MARK_LETTER * len(f"worst: {worst}") if worst in box.members else 0.0
    return max(_TITLE_LETTER * len(_title(box.label, letters)), marked, 55.0) + 22  # and what is around it


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
        (html.WHITE, "no multiplications"),
    ]
    cells = "".join(
        f'<TD>{html.swatch(paint)}</TD><TD ALIGN="LEFT">{html.font(text, size=11)}</TD><TD WIDTH="6"></TD>' for paint, text in entries
    )
    lines = [plan.summary] if len(plan.summary) <= _LINE else plan.summary.split("; ")
    lines.append("W8: bits of the weights")
    if worst is not None:
        lines[-1] += f"; thick border: largest Quantization Sensitivity (QS), {figure(qs[worst], 3)} in {worst}"
    rows = f'<TR><TD ALIGN="LEFT">{html.font(title, size=16, bold=True)}</TD></TR>' if title else ""
    rows += f'<TR><TD ALIGN="LEFT"><TABLE BORDER="0" CELLBORDER="0" CELLSPACING="2"><TR>{cells}</TR></TABLE></TD></TR>'
    rows += "".join(f'<TR><TD ALIGN="LEFT">{html.font(line, size=11, color=html.MUTED)}</TD></TR>' for line in lines)
    rows += '<TR><TD HEIGHT="10"></TD></TR>'
    return f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="2">{rows}</TABLE>>'
