"""The modules of a network, few enough to be looked at as a whole: repeated ones as one, the largest opened as far as there is room."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from math import ceil

from lightning_cco.graph.layer import Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.ops import Category, operation_of_kind
from lightning_cco.graph.select import containers

_ENDS = ("input", "output")
_LUMP = 0.6  # of all layers: a box of so many says nothing of the network
_FEW = 8  # modules that need not be opened
_COMPARED = 300  # boxes among which the smallest neighbours are looked for


@dataclass
class Box:
    """One box of an overview.

    Attributes:
        label: Path of its module, with ranges if it represents repeated ones; names of the inputs or outputs.
        members: Its layers, in execution order.
        repeats: How many repeated modules it represents.
        end: ``input`` or ``output``; empty for modules.
    """

    label: str
    members: list[str] = field(default_factory=list)
    repeats: int = 1
    end: str = ""


def modules_view(
    graph: LayerGraph, mark: Callable[[Layer], Hashable], most: int, whole: bool = True
) -> tuple[list[Box], list[tuple[int, int]]]:
    """Group a graph's layers by module.

    A layer that a module runs itself, between its submodules, goes with the box before it, and so does a module of dropouts alone.

    Args:
        graph: The layers.
        mark: What must be equal, in addition to kinds and names, for two modules to be shown as one.
        most: Boxes at most, inputs and outputs included.
        whole: Whether a module is shown as one if it holds more boxes than there is room for. Else only what holds most of the network is opened, and
            neighbours in it are put together where there is no room.

    Returns:
        The boxes in execution order, and the edges between them as pairs of their numbers.
    """
    view = _ModulesView(graph, mark)
    opened = {""} | view.undeployed()
    boxes = view.boxes(opened)
    while (wider := view.open_largest(boxes, opened)) is not None:
        more = view.boxes(wider)
        if len(more) > most if whole else not is_lump(graph, boxes):
            break
        opened, boxes = wider, more
    boxes = _merged(boxes, most)
    number = {name: index for index, box in enumerate(boxes) for name in box.members}
    edges = {(number[edge.source], number[edge.destination]): None for edge in graph.edges}
    return boxes, [(source, destination) for source, destination in edges if source != destination]


def module_of_each_layer(graph: LayerGraph, most: int) -> dict[str, str]:
    """The module that each layer is shown in, if as many modules are shown as there is room for, each by itself; empty for a layer between them.

    Args:
        graph: The layers.
        most: Modules at most, and layers between them; inputs and outputs do not count.
    """
    view = _ModulesView(graph, lambda layer: layer.name)

    def shown(opened: set[str]) -> dict[str, str]:
        paths = {name: view.box_of(name, opened) for name in graph.names}
        return {name: "" if path is None else view.outermost(path) for name, path in paths.items()}

    opened = {""}
    found = shown(opened)
    while (wider := view.open_largest(view.boxes(opened), opened)) is not None:
        more = shown(wider)
        if len({path or name for name, path in more.items() if graph[name].kind not in _ENDS}) > most:
            break
        opened, found = wider, more
    return found


def is_lump(graph: LayerGraph, boxes: Sequence[Box]) -> bool:
    """Whether one box, which does not stand for repeated modules, holds most of the network although it could be opened."""
    box = max((box for box in boxes if not box.end), key=lambda box: len(box.members), default=Box(""))
    paths = {graph[name].path for name in box.members}
    return box.repeats == 1 and len(box.members) > _LUMP * len(graph) and len(paths) > _FEW


class _ModulesView:
    def __init__(self, graph: LayerGraph, mark: Callable[[Layer], Hashable]) -> None:
        self.graph = graph
        self.first: dict[str, str] = {}  # a repeated module's path -> that of the first of its run
        self.runs: dict[str, list[str]] = {}
        self._fold(mark)
        self.paths = {layer.name: self._shown(layer.path) for layer in graph}
        self.sizes = Counter(path for shown in self.paths.values() for path in containers(shown))

    def _fold(self, mark: Callable[[Layer], Hashable]) -> None:
        """Find the modules that repeat one after the other under one parent: same layers, sizes and decisions."""
        signatures: dict[str, list[Hashable]] = {}
        for layer in self.graph:
            for path in containers(layer.path):
                signatures.setdefault(path, []).append((layer.path[len(path) :], layer.kind, tuple(layer.output_shapes), mark(layer)))
        before: dict[str, str] = {}
        for path in signatures:
            parent, _, child = path.rpartition(".")
            if not child.isdigit():
                continue
            other = before.get(parent)
            if other is not None and signatures[other] == signatures[path]:
                self.first[path] = self.first.get(other, other)
            else:
                self.first[path] = path
            self.runs.setdefault(self.first[path], []).append(path)
            before[parent] = path

    def _shown(self, path: str) -> str:
        """The path in which each repeated module is the first of its run."""
        parts: list[str] = []
        for part in path.split("."):
            parts.append(part)
            whole = ".".join(parts)
            parts = self.first.get(whole, whole).split(".")
        return ".".join(parts)

    def _label(self, path: str) -> tuple[str, int]:
        """A shown path with ranges in it, and for how many modules it stands."""
        path = self.outermost(path)
        parts, repeats = path.split("."), 1
        for end in range(len(parts), 0, -1):
            run = self.runs.get(".".join(path.split(".")[:end]), [])
            if len(run) > 1:
                parts[end - 1] = f"[{parts[end - 1]}-{run[-1].rpartition('.')[2]}]"
                repeats *= len(run)
        return ".".join(parts), repeats

    def outermost(self, path: str) -> str:
        """Of modules that hold nothing but each other the outermost one."""
        while (outer := path.rpartition(".")[0]) and self.sizes[outer] == self.sizes[path] and len(self.runs.get(path, [])) < 2:
            path = outer
        return path

    def undeployed(self) -> set[str]:
        """The shown paths of modules whose layers are none of the deployed model."""
        deployed: dict[str, bool] = {}
        for layer in self.graph:
            for path in containers(self.paths[layer.name]):
                deployed[path] = deployed.get(path, False) or operation_of_kind(layer.kind).category is not Category.IDENTITY
        return {path for path, its in deployed.items() if not its}

    def box_of(self, name: str, opened: set[str]) -> str | None:
        """The outermost module around a layer that is not opened; `None` for what an opened module runs itself."""
        parts = self.paths[name].split(".") if self.paths[name] else []
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in opened:
                return path
        return None

    def boxes(self, opened: set[str]) -> list[Box]:
        """The boxes, if these modules are opened."""
        found: dict[str, Box] = {}
        ends: dict[str, list[Box]] = {kind: [] for kind in _ENDS}
        waiting: list[str] = []
        current: Box | None = None
        for layer in self.graph:
            if layer.kind in _ENDS:
                ends[layer.kind].append(Box(layer.name, [layer.name], end=layer.kind))
                continue
            path = self.box_of(layer.name, opened)
            if path is not None:
                if path not in found:
                    label, repeats = self._label(path)
                    found[path] = Box(label, repeats=repeats)
                current = found[path]
                current.members += [*waiting, layer.name]
                waiting = []
            elif current is not None:
                current.members.append(layer.name)
            else:
                waiting.append(layer.name)
        if waiting:
            found[""] = Box(waiting[0] if len(waiting) == 1 else f"{waiting[0]} … {waiting[-1]}", waiting)
        return [*_few(ends["input"]), *found.values(), *_few(ends["output"])]

    def open_largest(self, boxes: list[Box], opened: set[str]) -> set[str] | None:
        """Open the box with the most layers that has modules inside, and its siblings with it; `None` if none has."""
        for box in sorted(boxes, key=lambda box: -len(box.members)):
            paths = {path for name in box.members if (path := self.box_of(name, opened)) is not None}
            if any(self._has_inside(path) for path in paths):
                alike = {_without_digits(path) for path in paths}
                closed = {path for name in self.paths if (path := self.box_of(name, opened)) is not None}
                return opened | {path for path in closed if _without_digits(path) in alike and self._has_inside(path)}
        return None

    def _has_inside(self, path: str) -> bool:
        return any(other.startswith(f"{path}.") for other in self.sizes)


def _without_digits(path: str) -> str:
    """What the paths of siblings have in common: ``layer2`` and ``layer3``, ``stages.0.blocks`` and ``stages.1.blocks``."""
    return re.sub(r"\d+", "#", path)


def _few(ends: list[Box]) -> list[Box]:
    """Inputs or outputs: some by themselves, many in one box."""
    if len(ends) <= 2:
        return ends
    names = [name for box in ends for name in box.members]
    return [Box(f"{names[0]} … {names[-1]}", names, end=ends[0].end)]


def _merged(boxes: list[Box], most: int) -> list[Box]:
    """Put neighbours together until there are few enough, always the two with the fewest layers: small ones at a net's start and end, not its stages."""
    ends = [box for box in boxes if box.end]
    inner = [box for box in boxes if not box.end]
    length = ceil(len(inner) / _COMPARED)
    stretches = [inner[start : start + length] for start in range(0, len(inner), length)] if inner else []
    sizes = [sum(len(box.members) for box in stretch) for stretch in stretches]
    while len(stretches) > max(1, most - len(ends)):
        at = min(range(len(sizes) - 1), key=lambda place: sizes[place] + sizes[place + 1])
        stretches[at : at + 2] = [stretches[at] + stretches[at + 1]]
        sizes[at : at + 2] = [sizes[at] + sizes[at + 1]]
    merged = [
        Box(f"{stretch[0].label} … {stretch[-1].label}", [name for box in stretch for name in box.members])
        if len(stretch) > 1
        else stretch[0]
        for stretch in stretches
    ]
    return [*(box for box in ends if box.end == "input"), *merged, *(box for box in ends if box.end == "output")]
