"""Calls that a loop over modules makes: told apart by the module that was called before them.

Calls of one operation, or of one module, within a frame are told apart by their order. In a loop over modules one line makes several of them, and a training
may leave modules out (stochastic depth, LayerDrop); the order is then that of others. Such calls are therefore counted anew after each module that the frame
calls once: the numbers after a module start where no other's are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_cco.graph.call import Call
from lightning_cco.graph.call_node import CallNode, ModuleCall
from lightning_cco.graph.python_calls import position_of_module_call

_BITS = 16
"""Of a number: which call after a module; the bits above say after which."""


@dataclass(frozen=True)
class _Begin:
    """What a frame had called when it called a module: how often each operation, and each module; and from where in the user's code it called it."""

    after: int
    position: int
    counts: dict[str, int]
    calls: dict[str, int]


class Loops:
    """What the capture sees of a forward in evaluation mode, to find its loops.

    Attributes:
        counted: Each call of an operation: its frame, its kind, its number, and the `CallNode.ordinal` of the module called before it.
    """

    def __init__(self) -> None:
        self.counted: list[tuple[CallNode, str, int, int]] = []
        self._begins: dict[CallNode, _Begin] = {}
        self._once: dict[CallNode, list[int]] = {}
        self._counts: dict[tuple[CallNode, int], dict[str, int]] = {}

    def note_module(self, frame: ModuleCall, node: CallNode) -> None:
        """Note that a frame calls a module, in the hooks of that."""
        self._begins[node] = _Begin(frame.last, position_of_module_call(), dict(frame.counts), dict(frame.calls))
        self._counts[frame.node, node.ordinal] = self._begins[node].counts
        frame.last = node.ordinal

    def find(self, root: CallNode, calls: Iterable[Call]) -> None:
        """Have the calls that a loop over modules makes counted anew after each of them, from now on, and number those of evaluation so.

        A module that only the training calls (noise, a dropout) begins no count: a loop that has one is counted alike in both modes.

        Args:
            root: The tree of module calls.
            calls: Of the forward.
        """
        lines: dict[tuple[CallNode, str, int], set[int]] = {}
        calls = list(calls)
        for call in calls:
            if call.visible and call.position >= 0:
                lines.setdefault((call.node, call.op.kind, call.position), set()).add(call.after)
        for (node, kind, _), ordinals in lines.items():
            if len({self._once_before(node, ordinal) for ordinal in ordinals}) > 1:
                node.numbers[kind] = set()
        for node in root.walk():
            self._start(node)
        for node, kind, index, after in self.counted:
            if kind in node.numbers:
                node.numbers[kind].add(self._number(node, kind, index, after))
        for call in calls:
            if call.op.kind in call.node.numbers:
                call.index = self._number(call.node, call.op.kind, call.index, call.after)

    def _start(self, node: CallNode) -> None:
        """Say from what the calls of a frame are counted after each module that it calls once."""
        shared = self._shared(node)
        node.loops = bool(node.numbers or shared)
        for child in node.children.values() if node.loops else ():
            if child in self._begins and (child.path, 1) not in node.children:
                calls = self._begins[child].calls
                child.starts = dict.fromkeys(node.numbers, child.ordinal << _BITS), {path: calls.get(path, 0) for path in shared}

    def _shared(self, node: CallNode) -> set[str]:
        """Paths of the modules that a line of a loop calls again and again, after others: an activation that all layers share."""
        first: dict[tuple[str, int], int] = {}
        found = set()
        for (path, _), child in node.children.items():
            begin = self._begins.get(child)
            if begin is not None and begin.position >= 0:
                once = self._once_before(node, begin.after)
                if first.setdefault((path, begin.position), once) != once:
                    found.add(path)
        return found

    def _number(self, node: CallNode, kind: str, index: int, after: int) -> int:
        ordinal = self._once_before(node, after)
        before = self._counts[node, ordinal].get(kind, 0) if ordinal else 0
        return ordinal << _BITS | index - before

    def _once_before(self, node: CallNode, ordinal: int) -> int:
        """The ordinal of the last module up to one that a frame calls once; 0: none."""
        found = self._once.get(node)
        if found is None:
            found = self._once[node] = [0]
            for child in node.children.values():
                found.append(found[-1] if (child.path, 1) in node.children else child.ordinal)
        return found[ordinal]


def segment_of(number: int) -> int:
    """After which module a number counts."""
    return number >> _BITS
