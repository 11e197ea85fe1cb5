"""Calls of modules: their tree, which the capture grows, and those that are running now."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from lightning_cco.graph.loop_calls import LoopCalls, Start, segment_of


class CallNode:
    """One call of one module within its chain of callers.

    Attributes:
        path: Dotted path of the module; empty for the root.
        index: Which call of this module within the frame of its caller.
        ordinal: Its place among the calls of modules within that frame, from 1.
        children: The calls made from within this one, by path and index.
        tables: For evaluation (`False`) and training (`True`): what to do with each function, by name. Filled by the runtime.
        seen: Likewise: how often the capture saw each kind of operation.
        places: Likewise: the place of each such call in the user's code, by kind and number.
        lines: The file and the line of each place, for compiled code.
        idle, idle_lines: By kind: places, and lines, of calls that are no layers; the next forward may leave them out, since it has kept what they gave.
        loops: Whether calls from within this one are counted anew after modules that it calls, since a loop makes them (`graph.loops`).
        numbers: By kind of operation that such a loop calls: its calls in the capture.
        start: What its caller's such operations, and shared modules, are counted from once this call has begun; `None`: they are counted on.
        captured: Whether the capture saw this call; a call it never saw must not be quantized.
        ran: Whether it has run, outside of compiled graphs, since somebody asked.
    """

    __slots__ = (
        "captured", "children", "idle", "idle_lines", "index", "lines", "loops", "numbers", "ordinal", "parent", "path", "places", "ran", "seen", "start",
        "tables",
    )  # fmt: skip

    def __init__(self, path: str, index: int = 0, parent: CallNode | None = None, captured: bool = True) -> None:
        self.path = path
        self.index = index
        self.parent = parent
        self.captured = captured
        self.ran = False
        self.ordinal = 0 if parent is None else len(parent.children) + 1
        self.loops = False
        self.numbers: dict[str, LoopCalls] = {}
        self.start: Start | None = None
        self.children: dict[tuple[str, int], CallNode] = {}
        self.tables: dict[bool, dict[str, Any]] = {False: {}, True: {}}
        self.seen: dict[bool, dict[str, int]] = {False: {}, True: {}}
        self.places: dict[bool, dict[str, dict[int, int]]] = {False: {}, True: {}}
        self.lines: dict[int, str] = {}
        self.idle: dict[str, set[int]] = {}
        self.idle_lines: dict[str, set[str]] = {}

    def child(self, path: str, index: int, captured: bool) -> CallNode:
        """The node of a call made from within this one, made on first use."""
        node = self.children.get((path, index))
        if node is None:
            node = self.children.setdefault((path, index), CallNode(path, index, self, captured))
        return node

    def known(self, kind: str, training: bool) -> Mapping[int, int]:
        """The place of each call of an operation that the capture saw, by number; -1: none that is of the user's code."""
        if kind in self.numbers:
            return self.numbers[kind].known(training)
        training = training and bool(self.seen[True])
        return {**dict.fromkeys(range(self.seen[training].get(kind, 0)), -1), **self.places[training].get(kind, {})}

    def forget_training(self) -> None:
        """The training's capture has failed."""
        self.seen[True].clear()
        self.places[True].clear()
        for calls in self.numbers.values():
            calls.forget_training()

    @property
    def key(self) -> str:
        """The module's path and, where a module is called more than once, which calls lead here: ``encoder.block#1``."""
        indices: list[int] = []
        node: CallNode | None = self
        while node is not None and node.parent is not None:
            indices.append(node.index)
            node = node.parent
        marks = "".join(f"#{index}" for index in reversed(indices)) if any(indices) else ""
        return f"{self.path}{marks}"

    def walk(self) -> list[CallNode]:
        """This node and all below it, callers first."""
        found, pending = [], [self]
        while pending:
            node = pending.pop()
            found.append(node)
            pending.extend(reversed(node.children.values()))
        return found

    def __repr__(self) -> str:
        return f"CallNode({self.key!r})"


class Called:
    """A module that a frame has called, and the one before it."""

    __slots__ = ("before", "node")

    def __init__(self, node: CallNode, before: Called | None) -> None:
        self.node, self.before = node, before


class ModuleCall:
    """A module call that is running now: its node, its table of functions, and how often each thing has been called so far.

    Attributes:
        records: Whether gradients were recorded when the outermost frame began.
        python: Identity of the Python frame of the module's call; 0 if unknown, as in compiled code and in a recomputation.
        unwatched: Whether the mode is off, for a module in which nothing is rounded.
        token: Of a thread's first frame: ends with the Python frame, also where no hook says so.
        last: For the capture: the module that it has called last.
    """

    __slots__ = ("calls", "counts", "last", "node", "python", "records", "table", "token", "training", "unwatched")

    def __init__(self, node: CallNode, training: bool, records: bool = False) -> None:
        self.node = node
        self.training = training
        self.records = records
        self.table: dict[str, Any] = node.tables[training]
        self.counts: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self.python = 0
        self.unwatched = False
        self.token: weakref.ref[Arguments] | None = None
        self.last: Called | None = None

    def copy(self) -> ModuleCall:
        """The same with counters of its own."""
        twin = ModuleCall(self.node, self.training, self.records)
        twin.counts, twin.calls = dict(self.counts), dict(self.calls)
        return twin

    def is_ready(self, start: Start) -> bool:
        """Whether what a loop calls before a module was counted as in the capture."""
        return all(segment_of(self.counts.get(kind, 0)) == segment for kind, (segment, _) in start.before.items()) and all(
            self.calls.get(path, 0) == count for path, count in start.calls_before.items()
        )

    def begin(self, start: Start) -> None:
        """Count the calls of a loop anew, after a module that it has called."""
        self.counts.update(start.counts)
        self.calls.update(start.calls)


class Arguments(dict[str, Any]):
    """Keyword arguments that can be referred to weakly: the call of a module holds them as long as it runs."""
