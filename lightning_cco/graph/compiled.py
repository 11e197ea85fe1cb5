"""Compiled graphs run without the function mode: what is in them is quantized already, and the mode would be asked about each of their operations.

The mode is on while a compiled module runs where PyTorch runs the hooks of the outermost compiled module outside of what it compiles. Where they are compiled
as well (``module.compile()``, a compiled step), nothing of ours runs in Python before a forward but what a graph does before it begins.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from lightning_cco.compat.dynamo import graph_being_traced
from lightning_cco.compat.torch_modes import function_mode_at, function_mode_count, pop_function_mode, push_function_mode


class HiddenMode(TorchFunctionMode):
    """A function mode that compiled graphs run without."""


class BlockMode(TorchFunctionMode):
    """A function mode of a ``with`` block. At its end those above it are taken off, too.

    PyTorch takes off the topmost one, whichever that is. After Ctrl-C it is that of the frames, whose hooks did not run: then this one would stay.
    """

    def __exit__(self, *_: object) -> None:
        modes = mode_stack()
        if self in modes:
            restore_modes(modes[: len(modes) - 1 - modes[::-1].index(self)])


class _WrappedCallable:
    """Stands for a callable, its attributes included."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        # A copy in the making has no "inner" yet; to whom a method is bound, the compiler would call instead of this.
        if name in ("inner", "__self__"):
            raise AttributeError(name)
        return getattr(self.inner, name)


class _Compiler(_WrappedCallable):
    """A compiler's backend whose graphs run without our modes."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        super().__init__(inner)
        self.holds: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Graph(self.inner(*args, **kwargs), frozenset(self.holds))


class _Graph(_WrappedCallable):
    """A compiled graph that runs without our modes, and says that it begins."""

    def __init__(self, inner: Callable[..., Any], holds: frozenset[str]) -> None:
        super().__init__(inner)
        self.holds = holds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        modes = mode_stack()
        if not any(isinstance(mode, HiddenMode) for mode in modes):
            return self._run(args, kwargs)
        restore_modes([mode for mode in modes if not isinstance(mode, HiddenMode)])
        try:
            return self._run(args, kwargs)
        finally:
            restore_modes(modes)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for name in self.holds:
            listener = _listeners.get(name)
            if listener is not None:
                listener.graph_begins()
        return self.inner(*args, **kwargs)


class GraphListener(Protocol):
    """Who is called when a compiled graph begins."""

    def graph_begins(self) -> None:
        """A graph that holds calls of theirs is about to run."""


_numbers = count()
_listeners: weakref.WeakValueDictionary[str, GraphListener] = weakref.WeakValueDictionary()


def register_listener(who: GraphListener) -> str:
    """Register a listener under a name, which a compiler takes for a constant: `hide_from_graph` says by it whose calls a graph holds."""
    name = f"model {next(_numbers)}"
    _listeners[name] = who
    return name


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def hide_from_graph(name: str) -> bool:
    """Let the graph that is traced now run without our modes, and call the listener of this name when it begins.

    A compiler without the attributes that this takes costs speed, and ranges that move only when they are read.
    """
    graph = graph_being_traced()
    if graph is None or graph.compiler_fn is None:
        return False
    if not isinstance(graph.compiler_fn, _Compiler):
        graph.compiler_fn = _Compiler(graph.compiler_fn)
    graph.compiler_fn.holds.add(name)
    return True


def mode_stack() -> list[Any]:
    """The function modes that are active, the innermost last."""
    return [function_mode_at(i) for i in range(function_mode_count())]


def innermost_mode() -> Any:
    """The innermost function mode; `None` if there is none. PyTorch itself does not look whether there is one."""
    count = function_mode_count()
    return function_mode_at(count - 1) if count else None


def restore_modes(modes: list[Any]) -> None:
    """Make these the active function modes."""
    while function_mode_count():
        pop_function_mode()
    for mode in modes:
        push_function_mode(mode)


class _Eager:
    """How many blocks want compiled code to run eagerly, over all threads: PyTorch's own switch is one for the process."""

    def __init__(self) -> None:
        self.lock, self.blocks = threading.Lock(), 0
        self.stance: Any = None


_eager = _Eager()


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled code eagerly inside the block."""
    with _eager.lock:
        _eager.blocks += 1
        if _eager.blocks == 1:
            _eager.stance = torch.compiler.set_stance("force_eager")
            _eager.stance.__enter__()
    try:
        yield
    finally:
        with _eager.lock:
            _eager.blocks -= 1
            if not _eager.blocks:
                _eager.stance.__exit__(None, None, None)
                _eager.stance = None
