"""Finds blocks that a model repeats one after the other, such as the twelve layers of an encoder."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_cco.graph.layer import Layer
from lightning_cco.graph.layer_graph import LayerGraph

MAX_PERIOD = 16  # modules and calls beside each other that repeat together
MIN_SAVED = 4  # layers that a run must hide to be worth a frame


@dataclass(frozen=True)
class Run:
    """A block and its repetitions, contiguous in execution order.

    Attributes:
        start: Position of the first layer of the first block.
        size: Layers in each block.
        repeats: Number of blocks.
        modules: Path of each module called in the first block, with the path that represents it in all blocks:
            ``{"encoder.layer.0": "encoder.layer.[0-11]"}``.
    """

    start: int
    size: int
    repeats: int
    modules: dict[str, str]

    @property
    def stop(self) -> int:
        """Position after the last layer of the last block."""
        return self.start + self.size * self.repeats


@dataclass(frozen=True)
class _ChildCall:
    """Layers in a row that are called in the same child of a module; one layer when the module calls it itself."""

    start: int
    stop: int
    child: str | None
    signature: int


def find_runs(graph: LayerGraph, mark: Callable[[Layer], Hashable]) -> list[list[Run]]:
    """Returns the runs by nesting level; those of a level lie in the first blocks of the level before."""
    return _RunFinder(graph, mark).find()


class _RunFinder:
    def __init__(self, graph: LayerGraph, mark: Callable[[Layer], Hashable]) -> None:
        position = {name: index for index, name in enumerate(graph.names)}
        self.parts = [layer.path.split(".") if layer.path else [] for layer in graph.layers]
        self.sources = [sorted(position[name] for name in graph.predecessors(layer.name)) for layer in graph.layers]
        self.own = [(layer.kind, repr(sorted(layer.attributes.items())), mark(layer)) for layer in graph.layers]
        self.signatures: dict[Hashable, int] = {}
        self.levels: list[list[Run]] = []
        self.body = [layer.kind not in ("input", "output") for layer in graph.layers]

    def find(self) -> list[list[Run]]:
        start = next((index for index, body in enumerate(self.body) if body), 0)
        waiting = [(start, start + sum(self.body), 0, 0)]
        while waiting:
            begin, end, depth, level = waiting.pop()
            units = self._split(begin, end, depth)
            inside = [False] * len(units)
            for first, last, period in self._candidates(units):
                if any(inside[first:last]):
                    continue
                inside[first:last] = [True] * (last - first)
                self._add(units[first:last], period, depth, level)
                waiting += [
                    (unit.start, unit.stop, depth + 1, level + 1) for unit in units[first : first + period] if unit.child is not None
                ]
            waiting += [
                (unit.start, unit.stop, depth + 1, level) for unit, taken in zip(units, inside, strict=True) if not taken and unit.child
            ]
        return [sorted(level, key=lambda run: run.start) for level in self.levels]

    def _split(self, begin: int, end: int, depth: int) -> list[_ChildCall]:
        units = []
        while begin < end:
            child = self.parts[begin][depth] if len(self.parts[begin]) > depth else None
            stop = begin + 1
            while child is not None and stop < end and self.parts[stop][depth : depth + 1] == [child]:
                stop += 1
            units.append(_ChildCall(begin, stop, child, self._signature(begin, stop, depth + 1)))
            begin = stop
        return units

    def _signature(self, begin: int, stop: int, depth: int) -> int:
        key = tuple((tuple(self.parts[i][depth:]), self.own[i], self._sources_inside(i, begin)) for i in range(begin, stop))
        return self.signatures.setdefault(key, len(self.signatures))

    def _sources_inside(self, position: int, begin: int) -> tuple[int, ...]:
        return tuple(source - begin for source in self.sources[position] if source >= begin)

    def _candidates(self, units: Sequence[_ChildCall]) -> list[tuple[int, int, int]]:
        """Returns (first unit, unit after the last, period) of everything that repeats, what hides most layers first."""
        found: list[tuple[int, int, int, int]] = []
        for period in range(1, min(MAX_PERIOD, len(units) // 2) + 1):
            begin = 0
            while begin + period < len(units):
                same = 0
                while begin + same + period < len(units) and units[begin + same].signature == units[begin + same + period].signature:
                    same += 1
                if same >= period:
                    found += self._trim(units, begin, same, period)
                begin += same + 1
        return [(first, last, period) for _, first, last, period in sorted(found)]

    def _trim(self, units: Sequence[_ChildCall], begin: int, same: int, period: int) -> list[tuple[int, int, int, int]]:
        """Returns the parts of a repetition whose blocks are also wired alike, each as (minus layers saved, first, last, period)."""
        repeats = same // period + 1
        spare = same % period
        lead = next((shift for shift in range(spare + 1) if units[begin + shift].child is not None), 0)  # start a block at a module
        begin += lead
        wiring = [self._wiring(units[begin + period * k : begin + period * (k + 1)]) for k in range(repeats)]
        parts = []
        k = 0
        while k < repeats:
            after = k + 1
            while after < repeats and wiring[after] == wiring[k] and self._reads_previous(units, begin + period * after, period):
                after += 1
            first, last = begin + period * k, begin + period * after
            size = units[first + period - 1].stop - units[first].start
            modules = any(unit.child is not None for unit in units[first : first + period])
            if after - k >= (2 if modules else 3) and (after - k - 1) * size >= MIN_SAVED:
                parts.append((-(after - k - 1) * size, first, last, period))
            k = after
        return parts

    def _reads_previous(self, units: Sequence[_ChildCall], first: int, period: int) -> bool:
        """Whether a block reads the one before it: branches side by side, such as query, key and value, are no repetition."""
        before, begin, stop = units[first - period].start, units[first].start, units[first + period - 1].stop
        return any(before <= source < begin for position in range(begin, stop) for source in self.sources[position])

    def _wiring(self, block: Sequence[_ChildCall]) -> tuple[tuple[int, ...], ...]:
        begin = block[0].start
        return tuple(self._sources_inside(position, begin) for position in range(begin, block[-1].stop))

    def _add(self, units: Sequence[_ChildCall], period: int, depth: int, level: int) -> None:
        start, size, repeats = units[0].start, units[period - 1].stop - units[0].start, len(units) // period
        modules: dict[str, str] = {}
        for offset, unit in enumerate(units[:period]):
            if unit.child is None:
                continue
            around = self.parts[unit.start][:depth]
            children = [other.child for other in units[offset::period] if other.child is not None]
            modules[".".join([*around, unit.child])] = ".".join([*around, span(children)])
        while len(self.levels) <= level:
            self.levels.append([])
        self.levels[level].append(Run(start, size, repeats, modules))


def span(children: Sequence[str]) -> str:
    """Returns one text for the names of several modules.

    >>> span(["0", "1", "2"]), span(["block1", "block2"]), span(["0", "2", "4"]), span(["a", "b", "c"]), span(["x", "x"])
    ('[0-2]', 'block[1-2]', '[0-4:2]', '{a…c}', 'x')
    """
    if len(set(children)) == 1:
        return children[0]
    matches = [re.fullmatch(r"(.*?)(\d+)", child) for child in children]
    if all(matches) and len({match[1] for match in matches if match}) == 1:
        numbers = [int(match[2]) for match in matches if match]
        steps = {after - before for before, after in pairwise(numbers)}
        if len(steps) == 1 and (step := steps.pop()) > 0:
            prefix = children[0][: len(children[0]) - len(str(numbers[0]))]
            return f"{prefix}[{numbers[0]}-{numbers[-1]}{f':{step}' if step > 1 else ''}]"
    return f"{{{children[0]}…{children[-1]}}}"
