"""The picture of a layer graph: blue for inputs and outputs, green for quantized layers, yellow for the others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import pydot

from lightning_cco.drawing import node_label as html
from lightning_cco.drawing.fold_repeats import MAX_NODES, BlockBox, FoldedView, LayerNode, folded_view, whole_view
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.ops import Category, operation_of_kind
from lightning_cco.names import printable
from lightning_cco.number_format import badness, figure
from lightning_cco.quantization.plan import Boundary, LayerDecision, QuantizationPlan

_LARGE = 1500  # nodes above which the layout takes short cuts
_MANY_READERS, _FAR = 4, 40  # a source with so many readers is copied beside those so many nodes away


def draw_graph(
    graph: LayerGraph,
    plan: QuantizationPlan | None = None,
    qs: Mapping[str, float] | None = None,
    fold: bool = False,
    title: str = "",
    max_nodes: int = MAX_NODES,
    rises: Mapping[str, float] | None = None,
) -> pydot.Dot:
    """Returns the picture of a graph as a pydot graph: text in the DOT language, which Graphviz renders.

    >>> import torch
    >>> from lightning_cco import capture_graph
    >>> graph = capture_graph(torch.nn.Linear(4, 2), torch.ones(1, 4))
    >>> draw_graph(graph).to_string().split("{")[0]
    'digraph layers '

    ``draw_graph(quantized.graph, quantized.plan).write_svg("model.svg")`` writes it with Graphviz' program ``dot``;
    ``lightning_cco.drawing.save_pictures`` does with the Graphviz inside pygraphviz, and never raises.

    Args:
        graph: The layers to draw; each is a node even when no edge touches it.
        plan: Colours, bits and reasons; without it, inputs and outputs are blue and all else is white.
        qs: Quantization Sensitivity by layer name; a number above the plan's threshold is red.
        fold: Whether repeated blocks, and in huge nets whole modules, become one node.
        title: First line of the picture.
        max_nodes: About how many nodes a folded picture may have.
        rises: Expected rise of the loss by layer name.
    """
    return _Drawing(graph, plan, qs or {}, title, rises or {}).draw(fold, max_nodes)


class _Drawing:
    def __init__(
        self, graph: LayerGraph, plan: QuantizationPlan | None, qs: Mapping[str, float], title: str, rises: Mapping[str, float]
    ) -> None:
        self.graph, self.rises = graph, rises
        self.plan = plan
        self.qs = {name: float(value) for name, value in qs.items() if name in graph}
        self.title = title
        self.largest = max((value for value in self.qs.values() if math.isfinite(value)), default=0.0)
        self.threshold = None if plan is None else plan.settings.global_quantization_settings.quantization_sensitivity_threshold
        self.crossing = {self._last_edge(boundary) for boundary in plan.boundaries} if plan is not None else set()
        self.ghosts: dict[str, list[str]] = {}

    def draw(self, fold: bool, max_nodes: int) -> pydot.Dot:
        view = folded_view(self.graph, self._mark, max_nodes) if fold else whole_view(self.graph)
        dot = pydot.Dot("layers", graph_type="digraph")
        dot.set_graph_defaults(
            rankdir="TB", bgcolor="white", pad="0.3", nodesep="0.3", ranksep="0.32", fontname=html.SANS, labelloc="t", labeljust="l"
        )
        dot.set_node_defaults(shape="plain", fontname=html.SANS, fontsize="13", fontcolor=html.TEXT)
        dot.set_edge_defaults(color="#6B7785", penwidth="1.1", arrowsize="0.6", fontname=html.SANS, fontsize="9")
        dot.set("label", self._legend(view))
        if len(view.groups) > _LARGE:
            dot.set_graph_defaults(nslimit="2", nslimit1="2", splines="line")
        groups = {group.key: group for group in view.groups}
        self.ghosts = _far_sources(view)
        self._add_nodes(dot, [group.key for group in view.groups], view.frames, groups)
        self._add_edges(dot, view)
        return dot

    def _add_nodes(self, holder: pydot.Graph, keys: Sequence[str], frames: Sequence[BlockBox], groups: Mapping[str, LayerNode]) -> None:
        framed = {key for frame in frames for key in frame.all_keys()}
        for key in keys:
            if key not in framed:
                holder.add_node(self._node(groups[key]))
                for source in self.ghosts.get(key, ()):
                    holder.add_node(pydot.Node(quoted(f"{source} for {key}"), label=html.ghost_label(source), tooltip=hint(source)))
        for frame in frames:
            box = pydot.Subgraph(
                quoted(f"cluster_{len(holder.get_subgraphs())}_{frame.all_keys()[0]}"),
                label=f"<{html.font(frame.label, size=12, color=html.MUTED, bold=True)}>",
                style="rounded,dashed",
                color="#8894A0",
                bgcolor="#F7F9FB",
                margin="14",
            )
            self._add_nodes(box, frame.all_keys(), frame.frames, groups)
            holder.add_subgraph(box)

    def _add_edges(self, dot: pydot.Dot, view: FoldedView) -> None:
        for source, destination in view.edges:
            start = f"{source} for {destination}" if source in self.ghosts.get(destination, ()) else source
            edge = pydot.Edge(quoted(start), quoted(destination))
            if view.edges_behind.get((source, destination), (source, destination)) in self.crossing:
                edge.set("style", "dashed")
                edge.set("color", html.YELLOW.border)
                edge.set("penwidth", "1.6")
            dot.add_edge(edge)

    def _node(self, group: LayerNode) -> pydot.Node:
        label, tooltip = self._layer(group) if group.is_layer else self._module(group)
        return pydot.Node(quoted(group.key), label=label, tooltip=hint(tooltip))

    def _layer(self, group: LayerNode) -> tuple[str, str]:
        layer = self.graph[group.key]
        decision = self._decision(layer.name)
        rows = [html.shapes_row(layer.input_shapes, layer.output_shapes), html.attributes_rows(layer.attributes)]
        is_end = layer.kind in ("input", "output")
        if decision is not None and not decision.quantized and layer.kind != "output":
            rows.append(
                html.reason_rows(decision) if _is_deployed(layer) else html.text_row("not part of the deployed model", color=html.MUTED)
            )
        worst = self._worst(group.members)
        where = f" worst of {group.repeats}" if group.repeats > 1 else ""
        rows.append(html.status_row(_bits(decision), self.qs.get(worst) if worst else None, self.largest, self.threshold, where))
        if layer.name in self.rises and group.repeats == 1:
            rows.append(html.text_row(f"expected rise of the loss {figure(self.rises[layer.name], 3)}"))
        if decision is None:
            paint = html.BLUE if is_end else html.WHITE
        else:
            paint = html.BLUE if is_end else html.GREEN if decision.quantized else html.YELLOW if _is_deployed(layer) else html.WHITE
        title = layer.name if group.repeats == 1 else f"{layer.name} …"
        label = html.node_label(title, html.type_name(layer.kind), group.path, rows, paint, border=2 if is_end else 1)
        lines = [
            f"{layer.name}: {html.type_name(layer.kind)}",
            printable(layer.path),
            printable(", ".join(layer.parameters)),
            printable(decision.detail) if decision else "",
        ]
        if group.repeats > 1:
            lines.append(f"stands for {', '.join(group.members)}")
        return label, "\n".join(line for line in lines if line)

    def _module(self, group: LayerNode) -> tuple[str, str]:
        kinds = Counter(self.graph[name].kind for name in group.members)
        if set(kinds) <= {"input", "output"}:
            ends = " · ".join(f"{count} {kind}s" for kind, count in kinds.items())
            return html.node_label(group.path or group.key, ends, "", [], html.BLUE, border=2), ", ".join(group.members)
        commonest = " · ".join(f"{count} {kind}" for kind, count in kinds.most_common(3)) + (" …" if len(kinds) > 3 else "")
        rows = [html.text_row(commonest, color=html.MUTED)]
        paint = html.WHITE
        if self.plan is not None:
            decisions = {name: self.plan.decisions[name] for name in group.members if _is_deployed(self.graph[name])}
            counted = [name for name in decisions if self.graph[name].weighted] or list(decisions)
            quantized = sum(name in self.plan.quantized for name in counted)
            in_int8 = sum(name in self.plan.in_int8 for name in counted)
            reasons = Counter(decision.reason for decision in decisions.values() if not decision.quantized and decision.reason)
            if any(layer.weighted for layer in map(self.graph.__getitem__, counted)):
                rows.append(html.share_row(in_int8, len(counted)))
            if reasons:
                listed = ", ".join(f"{count} {html.in_short(reason)}" for reason, count in reasons.most_common())
                rows += [html.text_row(line, color="#7A5B00", bold=True) for line in html.balanced(f"not quantized: {listed}")]
            paint = html.GREEN if quantized == len(counted) else html.MIXED if quantized else html.YELLOW
        worst = self._worst(group.members)
        if worst:
            rows.append(html.status_row("", self.qs[worst], self.largest, self.threshold, f" in {worst}"))
        count = f"{len(group.members)} layers" if group.repeats == 1 else f"× {group.repeats} · {len(group.members)} layers"
        return html.node_label(group.path or group.key, count, "", rows, paint, border=2), ", ".join(group.members)

    def _last_edge(self, boundary: Boundary) -> tuple[str, str]:
        """Returns the edge on which a boundary is drawn: the one into its destination, also when value-preserving layers lie between."""
        for before in self.graph.predecessors(boundary.destination):
            name = before
            while name != boundary.source and len(self.graph.predecessors(name)) == 1:
                name = self.graph.predecessors(name)[0]
            if name == boundary.source:
                return before, boundary.destination
        return boundary.source, boundary.destination

    def _decision(self, name: str) -> LayerDecision | None:
        return None if self.plan is None else self.plan.decisions.get(name)

    def _mark(self, layer: Layer) -> Hashable:
        decision = self._decision(layer.name)
        return None if decision is None else (decision.quantized, decision.reason, _bits(decision))

    def _worst(self, names: Sequence[str]) -> str | None:
        measured = [name for name in names if name in self.qs]
        return max(measured, key=lambda name: badness(self.qs[name]), default=None)

    def _legend(self, view: FoldedView) -> str:
        entries = [(html.BLUE, "input or output"), (html.WHITE, "layer")]
        lines = []
        if self.plan is not None:
            entries = [(html.BLUE, "input or output"), (html.GREEN, "in INT8"), (html.YELLOW, "in float")]
            if any(not group.is_layer for group in view.groups):
                entries.append((html.MIXED, "some of it in INT8"))
            if not all(map(_is_deployed, self.graph)):
                entries.append((html.WHITE, "not deployed"))
            lines += [self.plan.summary, "W8 A8: bits of weights and of the output"]
            if self.crossing:
                lines.append("dashed arrow: between float and integer")
        if self.qs:
            limit = "" if self.threshold is None else f", red above {figure(self.threshold, 3)}"
            lines.append(f"QS: Quantization Sensitivity{limit}; its bar: share of the largest, {figure(self.largest, 3)}")
        cells = "".join(
            f'<TD>{html.swatch(paint)}</TD><TD ALIGN="LEFT">{html.font(text, size=11)}</TD><TD WIDTH="6"></TD>' for paint, text in entries
        )
        rows = f'<TR><TD ALIGN="LEFT">{html.font(self.title, size=16, bold=True)}</TD></TR>' if self.title else ""
        rows += f'<TR><TD ALIGN="LEFT"><TABLE BORDER="0" CELLBORDER="0" CELLSPACING="2"><TR>{cells}</TR></TABLE></TD></TR>'
        rows += "".join(f'<TR><TD ALIGN="LEFT">{html.font(line, size=10, color=html.MUTED)}</TD></TR>' for line in lines)
        rows += '<TR><TD HEIGHT="10"></TD></TR>'
        return f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="2">{rows}</TABLE>>'


def _far_sources(view: FoldedView) -> dict[str, list[str]]:
    """Returns, by reader, the sources that a small copy beside the reader stands for.

    An attention mask that each of 48 blocks reads would draw 48 lines along the whole picture, and the layout would take minutes.
    """
    position = {group.key: index for index, group in enumerate(view.groups)}
    readers = Counter(source for source, _ in view.edges)
    ghosts: dict[str, list[str]] = {}
    for source, destination in view.edges:
        if readers[source] >= _MANY_READERS and abs(position[destination] - position[source]) > _FAR:
            ghosts.setdefault(destination, []).append(source)
    return ghosts


def _is_deployed(layer: Layer) -> bool:
    """Returns whether a layer is one of the deployed model, as all but dropout are."""
    return operation_of_kind(layer.kind).category is not Category.IDENTITY


def _bits(decision: LayerDecision | None) -> str:
    # What a float layer makes for an INT8 one is rounded, too, and so may be its weights.
    return "" if decision is None else decision.bits(" ")


def hint(text: str) -> str:
    """Returns a tooltip as DOT writes it, the middle of long lines left out.

    Graphviz reads no string of more than 16,384 bytes, and a module of a detector, whose loops are unrolled, may have thousands of layers.
    """
    return quoted("\n".join(printable(line, 800) for line in text.split("\n")))


def quoted(text: str) -> str:
    """Returns a text as DOT writes names: in quotes, on lines of their own."""
    lines = (printable(line).replace("\\", "\\\\").replace('"', '\\"') for line in text.split("\n"))
    return '"' + "\\n".join(lines) + '"'
