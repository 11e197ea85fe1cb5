"""The frames that run now, a stack for each thread, and the function mode that is on while there are any.

The mode is entered with the first frame of a thread and left with its last, so it sees every torch call that the model makes and none that the training
loop makes around it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import get_ident
from types import BuiltinFunctionType, FrameType, FunctionType, MethodDescriptorType, MethodWrapperType
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from lightning_cco.compat.autograd import graph_task, saved_hooks_on_top
from lightning_cco.compat.dynamo import TAKE_FUNCTIONS, traces_a_body
from lightning_cco.graph.attention import multi_head_attention
from lightning_cco.graph.call_node import Arguments, ModuleCall
from lightning_cco.graph.compiled import BlockMode, HiddenMode, hide_from_graph, mode_stack, register_listener, restore_modes
from lightning_cco.graph.framework_calls import CallOwner, owner_of_call
from lightning_cco.graph.hooks import Hooks
from lightning_cco.graph.operator_calls import as_function, is_operator
from lightning_cco.graph.recompute import COMPILED_CHECKPOINTS, InContext, Resumed, UnderMode, running_checkpoint

_FUNCTIONS = frozenset((BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodWrapperType))
"""Types of torch functions whose name says what they do; operators have names of another form."""

_MODEL = CallOwner.MODEL
_OTHERWISE = frozenset(("unflatten", "multi_head_attention_forward"))

Handler = Callable[["ModuleCall", str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class FrameMode(HiddenMode):
    """Hands each torch call to the handler, with the frame it belongs to."""

    def __init__(self, stacks: FrameStacks) -> None:
        super().__init__()
        self.frames = stacks

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if is_compiling():
            return self._compiled(func, args, kwargs)
        frames = self.frames
        stack = frames._main if get_ident() == frames._thread else frames.stack()
        if not stack:
            return func(*args, **kwargs)
        name, watched, frame = getattr(func, "__name__", ""), frames.watched, stack[-1]
        if watched is not None and name not in watched and name not in frame.table and type(func) in _FUNCTIONS:
            return func(*args, **kwargs)  # most calls: they move values, or ask for a shape
        if is_operator(func):
            name, func, args, kwargs = as_function(func, args, kwargs)
            if watched is not None and name not in watched and name not in frame.table:
                return func(*args, **kwargs)
        # A call that may be a layer's.
        origin = owner_of_call(frames.graphs, frame.python)
        if origin is not _MODEL:
            if origin is CallOwner.ENDED:
                frames.drop_ended(stack)
            if (origin is CallOwner.FOREIGN and name not in TAKE_FUNCTIONS) or not stack:
                return func(*args, **kwargs)
            frame = stack[-1]
        if frame.records and (saved_hooks_on_top(False) is not None or not is_grad_enabled()):
            frames.note_checkpoint(stack, entering=False)
        if name in _OTHERWISE:
            return self._otherwise(stack, name, func, args, kwargs)
        return frames.handle(frame, name, func, args, kwargs)

    def _compiled(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that a compiler traces."""
        stack, name = self.frames._main, getattr(func, "__name__", "")
        if not stack or name in TAKE_FUNCTIONS or traces_a_body():
            return func(*args, **kwargs)
        if is_operator(func):
            name, func, args, kwargs = as_function(func, args, kwargs)
        hide_from_graph(self.frames.name)
        if name in COMPILED_CHECKPOINTS:
            return func(UnderMode(self, args[0]), *args[1:], **kwargs)
        return self._otherwise(stack, name, func, args, kwargs)

    def _otherwise(self, stack: list[ModuleCall], name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is called by another function, or in another way."""
        if func is Tensor.unflatten:  # its Python half is one that the compiler can't trace under a mode
            func = torch.unflatten
        if name == "multi_head_attention_forward":
            if not self.frames.opens(stack[-1]):
                return func(*args, **kwargs)
            # Its inner matmuls would run with the mode off, out of sight.
            with self:
                return multi_head_attention(*args, **kwargs)
        return self.frames.handle(stack[-1], name, func, args, kwargs)


def _of_others(modes: list[Any]) -> list[Any]:
    return [mode for mode in modes if not isinstance(mode, FrameMode)]


class FrameStacks(Hooks):
    """The stack of frames of each thread, and the function mode.

    Args:
        model: Root of the module tree.
        handle: Called for each torch function with ``(frame, function name, function, args, kwargs)``; returns its result.

    Attributes:
        watched: Names of functions that the handler must see even where the frame's table does not have them; `None`: it sees all.
        carried: Called when a checkpoint's forward begins; makes the context in which its recomputation runs.
        graphs: Identities of the modules of the model that are graphs of `torch.fx`.
        opens: Whether what PyTorch hides in one call (multi-head attention) is to be seen in a frame; else it runs as it is, equal to the last bit.
        passes: Whether nothing is done with any call now: without gradients the mode then stays off, since PyTorch has faster paths without one.
        started: Called before the first frame of a thread is pushed, and before a compiled graph runs that has the hooks of all its modules in it.
        name: What compiled graphs know these by.
        graph_ran: Whether a compiled graph of the model has run since somebody asked.
    """

    def __init__(self, model: nn.Module, handle: Handler) -> None:
        super().__init__(model)
        self.handle = handle
        self.watched: frozenset[str] | None = None
        self.carried: Callable[[], Callable[[], AbstractContextManager[None]]] | None = None
        self.graphs: frozenset[int] = frozenset()
        self.opens: Callable[[ModuleCall], bool] = lambda _: True
        self.passes: Callable[[], bool] = lambda: False
        self.started: Callable[[], None] | None = None
        self.name = register_listener(self)
        self.graph_ran = False
        self._mode = FrameMode(self)
        self._main: list[ModuleCall] = []
        self._thread = get_ident()
        self._others: dict[int, list[ModuleCall]] = {}
        self._resuming = 0
        self._below: dict[int, list[Any]] = {}

    def reset(self) -> None:
        """Forget all frames."""
        self._main.clear()
        self._others.clear()
        self._leave_mode()

    def graph_begins(self) -> None:
        """A compiled graph is about to run. Where the first frame was pushed eagerly, and in a recomputation, the forward's beginning has been."""
        self.graph_ran = True
        stack = self.stack()
        if self.started is not None and self.attached and not (stack and stack[0].python) and graph_task() == -1:
            self.started()

    def _enter_mode(self) -> None:
        """Make the mode the innermost of this thread, and remember those that it stands above."""
        modes = mode_stack()
        if modes:
            self._below[get_ident()] = modes
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _leave_mode(self) -> None:
        """Take the mode off, wherever it stands, after an interrupt that no hook was told of.

        Where it is gone, the end of somebody's block around the call (``with torch.device(...)``) has taken it off instead of its own: PyTorch takes off the
        innermost, whichever that is. Then the mode of that block has stayed, which is the innermost of those that were below.
        """
        modes, below = mode_stack(), self._below.pop(get_ident(), [])
        if self._mode in modes:
            restore_modes([mode for mode in modes if mode is not self._mode])
            return
        if not all(mode in modes for mode in below if isinstance(mode, BlockMode)):
            return  # the end of such a block has put everything right
        stayed = None
        for was, number in zip(_of_others(below), (k for k, mode in enumerate(modes) if not isinstance(mode, FrameMode)), strict=False):
            if modes[number] is not was:
                break
            stayed = number
        if stayed is not None:
            restore_modes(modes[:stayed] + modes[stayed + 1 :])

    def drop_ended(self, stack: list[ModuleCall]) -> None:
        """Drop the frames of calls that ended without our hooks: after Ctrl-C and the like PyTorch does not run them, ``always_call`` or not."""
        running = set()
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            running.add(id(frame))
            frame = frame.f_back
        for depth, pushed in enumerate(stack):
            if pushed.python and pushed.python not in running:
                del stack[depth:]
                break
        if not stack:
            self._leave_mode()

    def _abandoned(self, thread: int, token: weakref.ref[Arguments]) -> None:
        """The first call of a thread has ended without our hook."""
        stack = self._main if thread == self._thread else self._others.get(thread)
        if stack and stack[0].token is token and thread == get_ident():
            stack.clear()
            self._leave_mode()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """After an interrupt inside the block, the frames of this thread are those of before."""
        stack = self.stack()
        depth = len(stack)
        try:
            yield
        except BaseException:
            del stack[depth:]
            if not stack:
                self._leave_mode()
            raise

    @contextmanager
    def handled_by(self, handle: Handler) -> Iterator[None]:
        """Let another handler see every call inside the block."""
        before = self.handle, self.watched
        self.handle, self.watched = handle, None
        try:
            yield
        finally:
            self.handle, self.watched = before

    def stack(self) -> list[ModuleCall]:
        """Frames of the current thread, the innermost last; autograd recomputes checkpoints on threads of its own."""
        if is_compiling() or get_ident() == self._thread:
            return self._main
        return self._others.setdefault(get_ident(), [])

    def note_checkpoint(self, stack: list[ModuleCall], entering: bool) -> None:
        """If a checkpoint's forward has just begun, let its recomputation begin with the same frames."""
        found = running_checkpoint(entering)
        if found is None:
            return
        checkpoint, attribute = found
        function = getattr(checkpoint, attribute)
        if not (isinstance(function, Resumed) and function.belongs_to(self)):
            if self.carried is not None:
                function = InContext(self.carried(), function)
            setattr(checkpoint, attribute, Resumed(self, [frame.copy() for frame in stack], function))

    @contextmanager
    def resumed(self, saved: list[ModuleCall]) -> Iterator[None]:
        """Put frames of an earlier time back inside the block. The backward may run on a separate thread, or inside of another forward."""
        stack = self.stack()
        before, stack[:] = list(stack), [frame.copy() for frame in saved]
        enters = bool(saved) and self._mode not in mode_stack()
        self._resuming += 1
        if enters:
            self._mode.__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self._resuming -= 1
            stack[:] = before
            if enters:
                self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
