"""Calls that a loop over modules makes: told apart by the module that was called before them.

Calls of one operation, or of one module, within a frame are told apart by their order. In a loop over modules one line makes several of them, and a training
may leave modules out (stochastic depth, LayerDrop); the order is then that of others. Such calls are therefore counted anew after each module that the frame
calls once: the numbers after a module start where no other's are (`graph.loop_calls`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_cco.graph.call import Call
from lightning_cco.graph.call_node import Called, CallNode, ModuleCall
from lightning_cco.graph.loop_calls import BITS, LoopCalls, Start
from lightning_cco.graph.python_calls import calling_line, calling_position, position_of_module_call


@dataclass(frozen=True)
class _Begin:
    """What a frame had called when it called a module: which module last, how often each operation, how many modules; and from where in the user's code."""

    after: Called | None
    position: int
    counts: dict[str, int]
    modules: int


class Loops:
    """What the capture sees of a forward in evaluation mode, to find its loops.

    Attributes:
        counted: Of each call of an operation, by its frame, its kind and its number: the module called before it, and its place.
    """

    def __init__(self) -> None:
        self.counted: dict[tuple[CallNode, str, int], tuple[Called | None, int]] = {}
        self._begins: dict[CallNode, _Begin] = {}
        self._once: dict[Called, int] = {}
        self._counts: dict[tuple[CallNode, int], dict[str, int]] = {}
        self._paths: dict[CallNode, list[str]] = {}

    def count(self, frame: ModuleCall, kind: str) -> int:
        """The number of a call of an operation that a frame makes now."""
        index, place = frame.counts.get(kind, 0), calling_position()
        if frame.training and kind in frame.node.numbers:
            index = frame.node.numbers[kind].note_training(index, place)
        frame.counts[kind] = index + 1
        frame.node.places[frame.training].setdefault(kind, {}).setdefault(index, place)
        if place not in frame.node.lines:
            frame.node.lines[place] = calling_line()
        self.counted[frame.node, kind, index] = frame.last, place
        return index

    def note_module(self, frame: ModuleCall, node: CallNode) -> None:
        """Note that a frame calls a module, in the hooks of that."""
        if frame.last is None:
            self._paths[frame.node] = []
        paths = self._paths[frame.node]
        self._begins[node] = _Begin(frame.last, position_of_module_call(), dict(frame.counts), len(paths))
        paths.append(node.path)
        self._counts[frame.node, node.ordinal] = self._begins[node].counts
        frame.last = Called(node, frame.last)

    def find(self, root: CallNode, calls: Iterable[Call]) -> None:
        """Have the calls that a loop over modules makes counted anew after each of them, from now on, and number those of evaluation so.

        A module that only the training calls (noise, a dropout) begins no count: a loop that has one is counted alike in both modes.

        Args:
            root: The tree of module calls.
            calls: Of the forward.
        """
        lines: dict[tuple[CallNode, str, int], set[Called | None]] = {}
        calls = list(calls)
        for call in calls:
            if call.visible and call.position >= 0:
                lines.setdefault((call.node, call.op.kind, call.position), set()).add(call.after)
        for (node, kind, _), before in lines.items():
            if len({self._once_before(node, after) for after in before}) > 1:
                node.numbers[kind] = LoopCalls()
        for node in root.walk():
            self._start(node)
        for (node, kind, index), (after, place) in self.counted.items():
            if kind in node.numbers:
                node.numbers[kind].places[False][self._number(node, kind, index, after)] = place
        for call in calls:
            if call.op.kind in call.node.numbers:
                call.index = self._number(call.node, call.op.kind, call.index, call.after)

    def _start(self, node: CallNode) -> None:
        """Say from what the calls of a frame are counted after each module that it calls once."""
        shared = self._shared(node)
        node.loops = bool(node.numbers or shared)
        if not node.loops:
            return
        calls, lines = self._calls_before(node, shared), dict[int, list[CallNode]]()
        for child in node.children.values():
            if child in self._begins and (child.path, 1) not in node.children:
                child.start = Start(dict.fromkeys(node.numbers, child.ordinal << BITS), calls[child.ordinal], {}, {})
                lines.setdefault(self._begins[child].position, []).append(child)
        for position, children in lines.items():
            if position >= 0 and len(children) > 1:
                self._note_before(node, children, calls)

    def _calls_before(self, node: CallNode, shared: set[str]) -> dict[int, dict[str, int]]:
        """How often each shared module had been called before each module, by its ordinal; 0: before any."""
        counts, at = dict.fromkeys(shared, 0), [dict.fromkeys(shared, 0)]
        for path in self._paths.get(node, ()):
            if path in counts:
                counts[path] += 1
            at.append(dict(counts))
        return {0: at[0], **{child.ordinal: at[self._begins[child].modules] for child in node.children.values() if child in self._begins}}

    def _note_before(self, node: CallNode, children: list[CallNode], calls: dict[int, dict[str, int]]) -> None:
        """Note what a loop calls before each of the modules that one of its lines calls, but for what follows those of another line: that is told by them."""
        segments = [self._once_before(node, self._begins[child].after) for child in children]
        positions = {child.ordinal: self._begins[child].position for child in node.children.values() if child in self._begins}
        if len({positions.get(segment, -1) for segment in segments}) < 2:
            return
        for kind in node.numbers:
            last = [self._last_before(node, child, kind) for child in children]
            if None not in last and len({one[1] for one in last if one}) == 1:
                for child, one in zip(children, last, strict=True):
                    if child.start is not None and one is not None:
                        child.start.before[kind] = one
        for path in calls[0]:
            if all(calls[child.ordinal][path] > calls[segment][path] for child, segment in zip(children, segments, strict=True)):
                for child in children:
                    if child.start is not None:
                        child.start.calls_before[path] = calls[child.ordinal][path]

    def _last_before(self, node: CallNode, child: CallNode, kind: str) -> tuple[int, int] | None:
        """After which module, and where, the last call before a module is; `None` if there is none after the module before it."""
        begin = self._begins[child]
        found = self.counted.get((node, kind, begin.counts.get(kind, 0) - 1))
        segment = self._once_before(node, begin.after)
        return (segment, found[1]) if found is not None and self._once_before(node, found[0]) == segment else None

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

    def _number(self, node: CallNode, kind: str, index: int, after: Called | None) -> int:
        ordinal = self._once_before(node, after)
        before = self._counts[node, ordinal].get(kind, 0) if ordinal else 0
        return ordinal << BITS | index - before

    def _once_before(self, node: CallNode, after: Called | None) -> int:
        """The ordinal of the last module up to one that a frame calls once; 0: none."""
        passed = []
        while after is not None and after not in self._once and (after.node.path, 1) in node.children:
            passed.append(after)
            after = after.before
        found = 0 if after is None else self._once.setdefault(after, after.node.ordinal)
        self._once.update(dict.fromkeys(passed, found))
        return found
