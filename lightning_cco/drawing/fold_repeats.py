"""What a picture shows: every layer, or a view in which repeated blocks and, where that is not enough, whole modules are folded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from math import ceil

from lightning_cco.drawing.repeats import Run, find_runs
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.select import containers

MAX_NODES = 60  # what can be looked at as a whole
FOLD_ABOVE = MAX_NODES
_SIDE_BY_SIDE = 4  # outputs of one node that are shown apart


@dataclass(frozen=True)
class LayerNode:
    """One node of a picture.

    Attributes:
        key: Name of the first layer it represents; unique in a view.
        members: All layers it represents, in execution order.
        path: Module path, with ranges if it represents repeated modules: ``encoder.layer.[0-11].attention``.
        repeats: How many repeated blocks it represents.
        is_layer: Whether it is one layer (the same one in each repeated block); otherwise it is a folded module.
    """

    key: str
    members: tuple[str, ...]
    path: str
    repeats: int = 1
    is_layer: bool = True


@dataclass(frozen=True)
class BlockBox:
    """A box around the nodes of one block that represents several."""

    label: str
    keys: tuple[str, ...]
    frames: tuple[BlockBox, ...] = ()

    def all_keys(self) -> list[str]:
        """Returns the keys inside, those of inner frames included."""
        return [*self.keys, *(key for inner in self.frames for key in inner.all_keys())]


@dataclass(frozen=True)
class FoldedView:
    """The nodes, edges and frames of a picture; edges are pairs of group keys, each pair once."""

    groups: tuple[LayerNode, ...]
    edges: tuple[tuple[str, str], ...]
    frames: tuple[BlockBox, ...] = ()
    edges_behind: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)


def whole_view(graph: LayerGraph) -> FoldedView:
    """Returns the view that shows every layer."""
    groups = tuple(LayerNode(layer.name, (layer.name,), layer.path) for layer in graph.layers)
    return FoldedView(groups, tuple(dict.fromkeys((edge.source, edge.destination) for edge in graph.edges)))


def folded_view(
    graph: LayerGraph, mark: Callable[[Layer], Hashable], max_nodes: int = MAX_NODES, fold_above: int = FOLD_ABOVE
) -> FoldedView:
    """Returns a view of at most about ``max_nodes`` nodes.

    First, blocks repeated one after the other (same kinds, attributes, edges and marks) are shown once. If that is not enough, modules
    become one node each, the deepest first and the largest first among them; last, stretches of layers in execution order do.

    Args:
        graph: The graph to show.
        mark: What must be equal, besides the layers themselves, for two blocks to be shown as one: the decisions of a plan.
        max_nodes: Where folding stops.
        fold_above: Graphs of at most so many layers are shown whole.
    """
    if len(graph) <= fold_above:
        return whole_view(graph)
    levels = find_runs(graph, mark)
    folding = _Folding(graph, levels)
    folding.collapse_modules(max_nodes)
    return folding.view(max_nodes)


class _Folding:
    """Positions of layers mapped to the positions shown for them, and those to groups."""

    def __init__(self, graph: LayerGraph, levels: Sequence[Sequence[Run]]) -> None:
        self.graph = graph
        self.levels = levels
        count = len(graph)
        self.run_at: list[list[Run | None]] = []
        for runs in levels:
            at: list[Run | None] = [None] * count
            for run in runs:
                at[run.start : run.stop] = [run] * (run.stop - run.start)
            self.run_at.append(at)
        self.shown = [self._representative(position) for position in range(count)]
        self.members: dict[int, list[int]] = {}
        for position, representative in enumerate(self.shown):
            self.members.setdefault(representative, []).append(position)
        self.collapsed: dict[str, int] = {}  # module path (of the shown block) -> position of its first shown layer

    def _representative(self, position: int) -> int:
        for at in self.run_at:
            run = at[position]
            if run is not None:
                position = run.start + (position - run.start) % run.size
        return position

    def _edge(self, source: int, destination: int) -> tuple[int, int] | None:
        """Returns the shown ends of an edge; None for one from a repeated block to the next, which the frame's × stands for."""
        for at in self.run_at:
            run = at[source]
            if run is not None and run is at[destination] and (source - run.start) // run.size != (destination - run.start) // run.size:
                return None
            source, destination = (
                end if (own := at[end]) is None else own.start + (end - own.start) % own.size for end in (source, destination)
            )
        return source, destination

    def collapse_modules(self, max_nodes: int) -> None:
        """Folds modules until the view fits. One whose layers have others between them stays: a reused ReLU as one node would lead edges back."""
        total = len(self.members)
        size: dict[str, int] = {}
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        order = {position: index for index, position in enumerate(sorted(self.members))}
        for position, index in order.items():
            for path in containers(self.graph.layers[position].path):
                size[path] = size.get(path, 0) + 1
                first.setdefault(path, position)
                last[path] = index
        in_one_piece = {path for path in size if last[path] - order[first[path]] + 1 == size[path]}
        by_depth: dict[int, list[str]] = {}
        for path in in_one_piece:
            by_depth.setdefault(path.count("."), []).append(path)
        for depth in sorted(by_depth, reverse=True):
            for path in sorted(by_depth[depth], key=lambda path: (-size[path], first[path])):
                if total <= max_nodes:
                    return
                saved = size[path] - 1
                if saved:
                    total -= saved
                    self.collapsed[path] = first[path]
                    for around in containers(path):
                        size[around] -= saved

    def view(self, max_nodes: int) -> FoldedView:
        layers = self.graph.layers
        group_of: dict[int, int] = {}  # shown position -> first shown position of its group
        module_of: dict[int, str] = {}
        for position in sorted(self.members):
            module = next((path for path in containers(layers[position].path) if path in self.collapsed), None)
            group_of[position] = position if module is None else self.collapsed[module]
            if module is not None:
                module_of[group_of[position]] = module
        labels = self._merge_outputs(group_of) | self._merge_stretches(group_of, max_nodes)
        shown_in: dict[int, list[int]] = {}
        for position, first in group_of.items():
            shown_in.setdefault(first, []).append(position)
        groups = []
        for first, positions in shown_in.items():
            members = sorted(member for position in positions for member in self.members[position])
            path = labels.get(first) or self._display(module_of.get(first, layers[first].path), first)
            repeats = len(self.members[first])
            names = tuple(layers[member].name for member in members)
            groups.append(LayerNode(layers[first].name, names, path, repeats, is_layer=len(positions) == 1 and first not in labels))
        edges, behind = self._edges(group_of)
        return FoldedView(tuple(groups), edges, self._frames(0, 0, len(layers), shown_in, group_of), behind)

    def _merge_outputs(self, group_of: dict[int, int]) -> dict[int, str]:
        """Makes one node of many outputs of one node: side by side, the caches of a decoder are wider than any screen."""
        position = {name: index for index, name in enumerate(self.graph.names)}
        sources: dict[int, set[int]] = {}
        for edge in self.graph.edges:
            ends = self._edge(position[edge.source], position[edge.destination])
            if ends is not None and self.graph.layers[ends[1]].kind == "output":
                sources.setdefault(ends[1], set()).add(group_of[ends[0]])
        alike: dict[tuple[int, ...], list[int]] = {}
        for output, read in sources.items():
            alike.setdefault(tuple(sorted(read)), []).append(output)
        many = [sorted(outputs) for outputs in alike.values() if len(outputs) > _SIDE_BY_SIDE]
        for outputs in many:
            group_of.update(dict.fromkeys(outputs, outputs[0]))
        return {outputs[0]: f"{self.graph.names[outputs[0]]} … {self.graph.names[outputs[-1]]}" for outputs in many}

    def _merge_stretches(self, group_of: dict[int, int], max_nodes: int) -> dict[int, str]:
        """Merges neighbours in execution order until the view fits; inputs and outputs stay apart from what is between them."""
        firsts = sorted(set(group_of.values()))
        if len(firsts) <= max_nodes:
            return {}
        length = ceil(len(firsts) / max(1, max_nodes - 3))
        kinds = [layer.kind if layer.kind in ("input", "output") else "" for layer in self.graph.layers]
        merged: dict[int, int] = {}
        labels: dict[int, str] = {}
        for kind in ("input", "", "output"):
            same = [first for first in firsts if kinds[first] == kind]
            for begin in range(0, len(same), length):
                stretch = same[begin : begin + length]
                merged.update(dict.fromkeys(stretch, stretch[0]))
                if len(stretch) > 1:
                    labels[stretch[0]] = f"{self.graph.names[stretch[0]]} … {self.graph.names[stretch[-1]]}"
        for position, first in group_of.items():
            group_of[position] = merged[first]
        return labels

    def _display(self, path: str, position: int) -> str:
        """Returns the path with ranges in place of the modules that stand for several."""
        for at in reversed(self.run_at):  # innermost first: the outer path is still what the inner run knows
            run = at[position]
            for module, shown in run.modules.items() if run is not None else ():
                if path == module or path.startswith(module + "."):
                    path = shown + path[len(module) :]
        return path

    def _edges(self, group_of: dict[int, int]) -> tuple[tuple[tuple[str, str], ...], dict[tuple[str, str], tuple[str, str]]]:
        names = self.graph.names
        position = {name: index for index, name in enumerate(names)}
        behind: dict[tuple[str, str], tuple[str, str]] = {}
        for edge in self.graph.edges:
            ends = self._edge(position[edge.source], position[edge.destination])
            if ends is None:
                continue
            source, destination = (group_of[end] for end in ends)
            if source != destination:
                behind.setdefault((names[source], names[destination]), (edge.source, edge.destination))
        return tuple(behind), behind

    def _frames(self, level: int, start: int, stop: int, shown_in: dict[int, list[int]], group_of: dict[int, int]) -> tuple[BlockBox, ...]:
        if level == len(self.levels):
            return ()
        frames = []
        for run in self.levels[level]:
            if not start <= run.start < stop:
                continue
            inside = range(run.start, run.start + run.size)
            firsts = sorted({group_of[position] for position in inside if position in group_of})
            if len(firsts) < 2 or any(position not in inside for first in firsts for position in shown_in[first]):
                continue  # folded into one node, or into a larger one
            inner = self._frames(level + 1, run.start, run.start + run.size, shown_in, group_of)
            framed = {key for frame in inner for key in frame.all_keys()}
            keys = tuple(key for key in (self.graph.names[first] for first in firsts) if key not in framed)
            frames.append(BlockBox(self._run_label(run, level), keys, inner))
        return tuple(frames)

    def _run_label(self, run: Run, level: int) -> str:
        shown = [self._display_outer(path, run.start, level) for path in run.modules.values()]
        if len(shown) > 2:
            shown = [shown[0], "…", shown[-1]]
        return f"{' + '.join(shown) or 'the same layers'} × {run.repeats}"

    def _display_outer(self, path: str, position: int, level: int) -> str:
        for at in reversed(self.run_at[:level]):
            run = at[position]
            for module, shown in run.modules.items() if run is not None else ():
                if path.startswith(module + "."):
                    path = shown + path[len(module) :]
        return path
