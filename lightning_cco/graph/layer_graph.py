"""The layer graph: which layers a model calls, in order, and which tensors run between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from lightning_cco.errors import CCOError
from lightning_cco.graph.ends import end_outputs
from lightning_cco.graph.layer import Edge, Layer, Shape
from lightning_cco.graph.select import PathIndex, select_layers
from lightning_cco.names import list_names, nearest, quote

_RANK = {"input": 0, "output": 2}


class LayerGraph:
    """The layers of a model as a directed acyclic graph; every query takes time linear in layers and edges.

    >>> layers = [Layer("input_0", "", "input"), Layer("conv", "stem", "conv", weighted=True), Layer("output_0", "", "output")]
    >>> graph = LayerGraph(layers, [Edge("input_0", "conv"), Edge("conv", "output_0")])
    >>> graph.names, graph.tail(), graph.select("stem")
    (('input_0', 'conv', 'output_0'), {'conv'}, ['conv'])

    Args:
        layers: Layers in execution order; names are unique. Inputs are moved to the front and outputs to the end.
        edges: Tensors between them.

    Attributes:
        layers: The layers in execution order, inputs first, outputs (kind ``output``) last.
        edges: The tensors between them, as given.
        names: The layers' names, in the same order.

    Raises:
        CCOError: A name comes twice, an edge ends at an unknown layer, or the edges form a cycle.
    """

    def __init__(self, layers: Sequence[Layer], edges: Sequence[Edge]) -> None:
        self.layers: tuple[Layer, ...] = tuple(sorted(layers, key=lambda layer: _RANK.get(layer.kind, 1)))
        self.edges: tuple[Edge, ...] = tuple(edges)
        self.names: tuple[str, ...] = tuple(layer.name for layer in self.layers)
        self._by_name = _index_by_name(self.layers)
        self._position = {name: position for position, name in enumerate(self.names)}
        self._predecessors, self._successors = _adjacency(self._by_name, self.edges)
        self._order = self._topological_order()
        self._paths: PathIndex | None = None

    def __getitem__(self, name: str) -> Layer:
        """Returns the layer of that name; a CCOError names the nearest ones when there is none."""
        try:
            return self._by_name[name]
        except KeyError:
            pass
        selected = self._path_index().below(name)
        if selected:
            raise CCOError(
                f"{quote(name)} is a module path, not the name of a layer. "
                f"The layers called there: {list_names(selected)}. Write one of these names, or graph.select({name!r})."
            )
        raise CCOError(f"There is no layer named {quote(name)} among the {len(self)} layers.{nearest(name, self.names)}")

    def __contains__(self, name: object) -> bool:
        """Whether a layer has that name."""
        return name in self._by_name

    def __iter__(self) -> Iterator[Layer]:
        """Iterates over the layers in execution order."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Returns the number of layers, inputs and outputs included."""
        return len(self.layers)

    def __repr__(self) -> str:
        """Says in one line how large the graph is; ``print(graph)`` shows every layer."""
        return f"LayerGraph({len(self.layers)} layers, {len(self.edges)} edges, inputs={self.inputs}, outputs={self.outputs})"

    def __str__(self) -> str:
        """Returns a table with one line per layer: name, module path, shapes, what it reads."""
        rows = [("layer", "module", "shapes", "reads")]
        for layer in self.layers:
            shapes = f"{_shapes(layer.input_shapes)} → {_shapes(layer.output_shapes)}"
            rows.append((layer.name, layer.path or "-", shapes, ", ".join(self._predecessors[layer.name]) or "-"))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join([*(row[column].ljust(widths[column]) for column in range(3)), row[3]]) for row in rows]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the layers of kind ``input``."""
        return tuple(layer.name for layer in self.layers if layer.kind == "input")

    @property
    def paths(self) -> dict[str, str]:
        """Of each layer the path of the module that runs it."""
        return {layer.name: layer.path for layer in self.layers}

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the layers of kind ``output``."""
        return tuple(layer.name for layer in self.layers if layer.kind == "output")

    def predecessors(self, name: str) -> tuple[str, ...]:
        """Returns the layers whose tensors this one reads, each once, in argument order as captured."""
        return tuple(self._predecessors[self[name].name])

    def successors(self, name: str) -> tuple[str, ...]:
        """Returns the layers that read this one's tensors, each once."""
        return tuple(self._successors[self[name].name])

    def ancestors(self, names: str | Iterable[str]) -> set[str]:
        """Returns the layers from which one of these can be reached, these included."""
        return self._reach(self._known(names), self._predecessors)

    def descendants(self, names: str | Iterable[str]) -> set[str]:
        """Returns the layers that can be reached from one of these, these included."""
        return self._reach(self._known(names), self._successors)

    def select(self, pattern: str) -> list[str]:
        """Returns the names of the layers that a pattern selects, in execution order.

        The first of these that matches counts: the name of a layer; a module path, which selects every layer called in that module or below it; a glob over
        names and module paths (``*`` matches dots too). With ``path:`` in front only module paths are matched.
        Outputs are selected by their exact name only.

        Raises:
            CCOError: Nothing matches; the message names the nearest names and paths.
        """
        return select_layers(pattern, self._by_name, self._path_index())

    def tail(self) -> set[str]:
        """Returns the layers from each output upstream to the first weighted layer of every branch, that layer included.

        In other words: the layers from which a path leads to an output with no weighted layer on it other than, possibly, its first. Of the weighted layers
        before an output those that another one of them reads are not part of it, nor what carries their results past that: the residual stream of an
        encoder without a head leads from each of its blocks to the output, but what comes after a block can make up for its error.

        The output markers themselves and the inputs of the model are not part of it. An output that other layers of the model also read (features
        that are returned together with the logits, an encoder's states together with the decoder's), as they are or moved, starts no tail if there is
        another output.
        """
        ends = end_outputs({name: self._by_name[name] for name in self._order}, self.edges)
        found = set().union(*map(self._tail_of, ends))
        return {name for name in found if self._by_name[name].kind not in ("input", "output")}

    def _tail_of(self, output: str) -> set[str]:
        reached = self._reach([output], self._predecessors, stop=lambda name: self._by_name[name].weighted)
        weighted = {name for name in reached if self._by_name[name].weighted}
        read = self._reach({before for name in weighted for before in self._predecessors[name]}, self._predecessors)
        if weighted.isdisjoint(read):
            return reached
        after_last = self._reach(weighted - read, self._successors)
        after_any = self._reach((layer.name for layer in self.layers if layer.weighted), self._successors)
        return {name for name in reached if name in after_last or name not in after_any}

    def between(self, start: str | Iterable[str], until: str | Iterable[str]) -> set[str]:
        """Returns the layers on the paths from ``start`` to any of ``until``: ``start`` included, the destinations not.

        Args:
            start: Name of a layer, or of several, for the paths from any of them.
            until: Name of the destination, or of several.

        Raises:
            CCOError: A destination can't be reached from each ``start``, or there is none.
        """
        starts, destinations = self._known(start), self._known(until)
        if not destinations:
            raise CCOError(f"No destination is given for the layers after {quote(starts[0])}; name at least one layer downstream of it.")
        for name in set(starts).intersection(destinations):
            raise CCOError(f"{quote(name)} can't be its own destination; name a layer downstream of it.")
        self._check_reachable(starts, destinations)
        return (self.descendants(starts) & self.ancestors(destinations)) - set(destinations)

    def downstream(self, start: str | Iterable[str]) -> set[str]:
        """Returns the layers that can be reached from ``start`` (one layer or several), itself included and the output markers not."""
        return {name for name in self.descendants(start) if self._by_name[name].kind != "output"}

    def _path_index(self) -> PathIndex:
        if self._paths is None:
            self._paths = PathIndex(self.layers)
        return self._paths

    def _known(self, names: str | Iterable[str]) -> list[str]:
        return [self[name].name for name in ([names] if isinstance(names, str) else names)]

    def _reach(self, starts: Iterable[str], neighbours: Mapping[str, Iterable[str]], stop: Callable[[str], bool] | None = None) -> set[str]:
        """Breadth-first search; a layer for which ``stop`` holds is reached but not passed."""
        reached = set(starts)
        queue = deque(reached)
        while queue:
            name = queue.popleft()
            if stop is not None and stop(name):
                continue
            for neighbour in neighbours[name]:
                if neighbour not in reached:
                    reached.add(neighbour)
                    queue.append(neighbour)
        return reached

    def _check_reachable(self, starts: Sequence[str], destinations: Sequence[str]) -> None:
        """Check that every start reaches every destination, in one pass: each layer passes the starts above it on, as the bits of a number."""
        bit = {name: 1 << number for number, name in enumerate(starts)}
        above: dict[str, int] = {}
        for name in self._order:
            reached = bit.get(name, 0)
            for before in self._predecessors[name]:
                reached |= above[before]
            above[name] = reached
        for destination in destinations:
            lacking = ((1 << len(starts)) - 1) & ~above[destination]
            if lacking:
                start = starts[(lacking & -lacking).bit_length() - 1]
                raise CCOError(self._unreachable(start, destination, self.descendants(start)))

    def _unreachable(self, start: str, destination: str, below: set[str]) -> str:
        message = f"{quote(destination)} can't be reached from {quote(start)}, so there is nothing between them."
        if start in self.descendants(destination):
            return f"{message} It lies upstream: write {quote(start)} as the destination of {quote(destination)} instead."
        candidates = [name for name in self.names if name in below and name != start]
        if not candidates:
            return f"{message} No layer reads what {quote(start)} returns."
        near = nearest(destination, candidates)
        return message + (near or f" Layers downstream of {quote(start)}: {list_names(candidates)}.")

    def _topological_order(self) -> list[str]:
        """Each layer after all that it reads; an error if there is no such order."""
        waiting = {name: len(before) for name, before in self._predecessors.items()}
        order = [name for name, count in waiting.items() if count == 0]
        for name in order:  # grows while it is read
            for successor in self._successors[name]:
                waiting[successor] -= 1
                if waiting[successor] == 0:
                    order.append(successor)
        stuck = {name for name, count in waiting.items() if count > 0}
        if not stuck:
            return order
        # Each stuck layer waits for a stuck predecessor, so that walking upstream from any of them comes back to where it was.
        walk: dict[str, None] = {}
        name = min(stuck, key=self._position.__getitem__)
        while name not in walk:
            walk[name] = None
            name = next(before for before in self._predecessors[name] if before in stuck)
        seen = list(walk)
        cycle = seen[seen.index(name) :][::-1]
        raise CCOError(f"The edges form a cycle: {' → '.join([*cycle, cycle[0]])}. A layer graph follows tensors forward in time only.")


def _index_by_name(layers: Sequence[Layer]) -> dict[str, Layer]:
    by_name: dict[str, Layer] = {}
    for layer in layers:
        if layer.name in by_name:
            raise CCOError(
                f"Two layers are named {quote(layer.name)}: one called in {quote(by_name[layer.name].path)}, "
                f"one in {quote(layer.path)}. Names must be unique."
            )
        by_name[layer.name] = layer
    return by_name


def _adjacency(by_name: Mapping[str, Layer], edges: Sequence[Edge]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    predecessors: dict[str, dict[str, None]] = {name: {} for name in by_name}  # dicts: each neighbour once, in order
    successors: dict[str, dict[str, None]] = {name: {} for name in by_name}
    for edge in edges:
        for end in (edge.source, edge.destination):
            if end not in by_name:
                raise CCOError(f"The edge {quote(edge.source)} → {quote(edge.destination)} ends at an unknown layer, {quote(end)}.")
        predecessors[edge.destination][edge.source] = None
        successors[edge.source][edge.destination] = None
    return {name: list(ends) for name, ends in predecessors.items()}, {name: list(ends) for name, ends in successors.items()}


def _shapes(shapes: Sequence[Shape]) -> str:
    return " ".join("×".join(map(str, shape)) or "scalar" for shape in shapes) or "-"
