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
    """What a frame had called when it called a module: which module last, and how often each operation; and from where in the user's code it called it."""

    after: CallNode | None
    position: int
    counts: dict[str, int]


class Loops:
    """What the capture sees of a forward in evaluation mode, to find its loops."""

    def __init__(self) -> None:
        self._counted: list[tuple[CallNode, str, int, CallNode | None]] = []
        self._begins: dict[CallNode, dict[CallNode, _Begin]] = {}
        self._once: dict[CallNode, CallNode | None] = {}

    def note_module(self, frame: ModuleCall, node: CallNode) -> None:
        """Note that a frame calls a module, in the hooks of that."""
        self._begins.setdefault(frame.node, {})[node] = _Begin(frame.last, position_of_module_call(), dict(frame.counts))
        frame.last = node

    def count(self, frame: ModuleCall, kind: str, index: int) -> None:
        """Note the number of a call of an operation. The training is traced once the loops are known: its calls have their final numbers."""
        if kind in frame.node.numbers:
            frame.node.numbers[kind].add(index)
        elif not frame.training:
            self._counted.append((frame.node, kind, index, frame.last))

    def find(self, root: CallNode, calls: Iterable[Call]) -> None:
        """Have the calls that a loop over modules makes counted anew after each of them, from now on, and number those of evaluation so.

        A module that only the training calls (noise, a dropout) begins no count: a loop that has one is counted alike in both modes.

        Args:
            root: The tree of module calls.
            calls: Of the forward.
        """
        for node, begins in self._begins.items():
            last = None
            for child in begins:
                last = last if _is_called_again(node, child) else child
                self._once[child] = last
        lines: dict[tuple[CallNode, str, int], set[CallNode | None]] = {}
        calls = list(calls)
        for call in calls:
            if call.visible and call.position >= 0:
                lines.setdefault((call.node, call.op.kind, call.position), set()).add(self._once_before(call.after))
        for (node, kind, _), after in lines.items():
            if len(after) > 1:
                node.numbers[kind] = set()
        for node in root.walk():
            self._start(node)
        for node, kind, index, last in self._counted:
            if kind in node.numbers:
                node.numbers[kind].add(self._number(node, kind, index, last))
        for call in calls:
            if call.op.kind in call.node.numbers:
                call.index = self._number(call.node, call.op.kind, call.index, call.after)

    def _start(self, node: CallNode) -> None:
        """Say from what the calls of a frame are counted after each module that it calls once."""
        shared = self._shared(node)
        node.loops = bool(node.numbers or shared)
        calls = dict.fromkeys(shared, 0)
        for child in self._begins.get(node, {}) if node.loops else ():
            if child.path in calls:
                calls[child.path] += 1
            elif not _is_called_again(node, child):
                child.starts = dict.fromkeys(node.numbers, child.ordinal << _BITS), dict(calls)

    def _shared(self, node: CallNode) -> set[str]:
        """Paths of the modules that a line of a loop calls again and again, after others: an activation that all layers share."""
        first: dict[tuple[str, int], CallNode | None] = {}
        found = set()
        for child, begin in self._begins.get(node, {}).items():
            once = self._once_before(begin.after)
            if begin.position >= 0 and first.setdefault((child.path, begin.position), once) is not once:
                found.add(child.path)
        return found

    def _number(self, node: CallNode, kind: str, index: int, after: CallNode | None) -> int:
        once = self._once_before(after)
        return index if once is None else once.ordinal << _BITS | index - self._begins[node][once].counts.get(kind, 0)

    def _once_before(self, last: CallNode | None) -> CallNode | None:
        """The last module, up to one, of those that its frame calls once; `None`: there is none."""
        return None if last is None else self._once[last]


def _is_called_again(node: CallNode, child: CallNode) -> bool:
    return (child.path, 1) in node.children


def segment_of(number: int) -> int:
    """After which module a number counts."""
    return number >> _BITS
