"""Calls that are no layers, since nothing of the input is in them. A network may make them in one forward and not in the next.

A table of positions is computed for the first image of each size, and kept (`functools.lru_cache`, an attribute). The calls of layers between them are told
from these by their places in the user's code, not by their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lightning_cco.graph.call import Call
from lightning_cco.graph.call_node import CallNode


def note_idle(root: CallNode, forwards: Iterable[tuple[CallNode, Sequence[Call]]]) -> None:
    """Note at each node the places of calls that were no layer in any forward.

    Args:
        root: The tree of module calls.
        forwards: The tree and the layers of each forward of the capture; a tree may be another one than `root`.
    """
    seen = list(forwards)
    layers = {(call.node.key, call.op.kind, call.position) for _, calls in seen for call in calls if call.visible}
    nodes = {node.key: node for node in root.walk()}
    of_layers: dict[tuple[CallNode, str], set[str]] = {}
    for tree, _ in seen:
        for node in tree.walk():
            ours = nodes.get(node.key)
            if ours is None:
                continue
            for kind, place, line in _calls(node):
                if (node.key, kind, place) in layers:
                    of_layers.setdefault((ours, kind), set()).add(line)
                elif place >= 0:
                    ours.idle.setdefault(kind, set()).add(place)
                    ours.idle_lines.setdefault(kind, set()).add(line)
    for (node, kind), lines in of_layers.items():
        node.idle_lines.get(kind, set()).difference_update(lines)


def _calls(node: CallNode) -> Iterator[tuple[str, int, str]]:
    """Kind, place and line of each call that was seen within a frame."""
    for kinds in node.places.values():
        for kind, places in kinds.items():
            for place in places.values():
                yield kind, place, node.lines[place]
