"""Which boxes an overview has, and where they stand: from left to right, or in rows if they are many, so that they can be read on one screen."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from math import ceil

from lightning_cco.drawing.modules_view import Box, is_lump, modules_view
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.layer_graph import LayerGraph

WIDEST = 1250
"""Points from the first box to the last: what is wider is shrunk to the width of a screen, and hard to read."""
_MOST, _FEWEST, _IN_ROWS = 11, 5, 18  # boxes
_ROWS = 3
_LABELS = (22, 18, 12)  # characters of a module's name: fewer where the boxes are too wide
_GAP = 14  # points between two boxes


@dataclass(frozen=True)
class Layout:
    """What an overview draws.

    Attributes:
        boxes: The boxes, in execution order.
        edges: Pairs of their numbers.
        letters: Characters of a module's name at most.
        rows: Numbers of the boxes in each row; empty: Graphviz places them from left to right.
    """

    boxes: list[Box]
    edges: list[tuple[int, int]]
    letters: int
    rows: list[list[int]] = field(default_factory=list)


def laid_out(graph: LayerGraph, mark: Callable[[Layer], Hashable], width: Callable[[Box, int], float]) -> Layout:
    """Choose the boxes of an overview: as many as can be read.

    One line from left to right, unless one box would then hold most of the network: then that one is opened, and the boxes stand in rows.

    Args:
        graph: The layers.
        mark: What must be equal for two modules to be shown as one; see `modules_view`.
        width: Points that a box takes, its name having so many characters at most.
    """
    for most in range(_MOST, _FEWEST - 1, -1):
        boxes, edges = modules_view(graph, mark, most)
        if is_lump(graph, boxes):
            break
        for letters in _LABELS[:2] if most > _FEWEST else _LABELS:
            if _reach(boxes, edges, lambda box, letters=letters: width(box, letters) + _GAP) - _GAP <= WIDEST:  # type: ignore[misc]
                return Layout(boxes, edges, letters)
    most = _IN_ROWS
    while True:
        boxes, edges = modules_view(graph, mark, most, whole=False)
        for letters in _LABELS:
            rows = _in_rows([width(box, letters) + _GAP for box in boxes])
            if len(rows) <= _ROWS or (most <= _FEWEST and letters == _LABELS[-1]):
                return Layout(boxes, edges, letters, rows)
        most -= 1


def _reach(boxes: Sequence[Box], edges: Sequence[tuple[int, int]], size: Callable[[Box], float]) -> float:
    """The size of the longest chain of boxes."""
    before: dict[int, list[int]] = {}
    for source, destination in edges:
        if source < destination:
            before.setdefault(destination, []).append(source)
    reach = [0.0] * len(boxes)
    for number, box in enumerate(boxes):
        reach[number] = size(box) + max((reach[source] for source in before.get(number, ())), default=0.0)
    return max(reach, default=0.0)


def _in_rows(widths: Sequence[float]) -> list[list[int]]:
    """Boxes in order, in rows of about the same width."""
    count = max(1, ceil(sum(widths) / WIDEST))
    while True:
        share = sum(widths) / count
        rows: list[list[int]] = [[]]
        filled = 0.0
        for number, width in enumerate(widths):
            if rows[-1] and len(rows) < count and filled + width / 2 > share * len(rows):
                rows.append([])
            rows[-1].append(number)
            filled += width
        if count >= len(widths) or all(sum(widths[number] for number in row) <= WIDEST for row in rows):
            return rows
        count += 1
