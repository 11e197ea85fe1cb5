"""Frames: which call of which module a torch function belongs to.

Each submodule gets a forward pre-hook and an ``always_call`` forward hook that push and pop a frame. One function mode is entered with the first
frame of a thread and left with its last, so it sees every torch call that the model makes and none that the training loop makes around it.

A call is identified by the chain of modules it runs in, each with its call index inside the module above, by its function, and by the index of
that function within the frame. Shapes, batch size and what other modules do have no say in it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from threading import get_ident
from types import BuiltinFunctionType, FrameType, FunctionType, MethodDescriptorType, MethodWrapperType
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.fx import GraphModule

from lightning_cco.compat.autograd import graph_task, saved_hooks_on_top
from lightning_cco.compat.modules import MODULE_CALL
from lightning_cco.compat.torch_modes import function_mode_at, function_mode_count, pop_function_mode, push_function_mode
from lightning_cco.errors import CCOError
from lightning_cco.graph.attention import multi_head_attention
from lightning_cco.graph.call_node import Arguments, CallNode, ModuleCall
from lightning_cco.graph.compiled import HiddenMode, hide_from_graph, mode_stack, restore_modes
from lightning_cco.graph.foreign import Origin, origin_of_call
from lightning_cco.graph.hooks import Hooks
from lightning_cco.graph.hooks import inert as _inert  # noqa: F401, models pickled by earlier versions name it here
from lightning_cco.graph.python_calls import module_call
from lightning_cco.graph.recompute import COMPILED_CHECKPOINTS, InContext, Resumed, UnderMode, running_checkpoint
from lightning_cco.graph.spelling import as_function, is_operator, name_of_operator

_FUNCTIONS = frozenset((BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodWrapperType))
"""Types of torch functions whose name says what they do; operators have names of another form."""

_getframe = sys._getframe
_MODEL = Origin.MODEL
_OTHERWISE = frozenset(("unflatten", "multi_head_attention_forward"))

Handler = Callable[["ModuleCall", str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class _FrameMode(HiddenMode):
    """Hands each torch call to the handler, with the frame it belongs to."""

    def __init__(self, frames: Frames) -> None:
        super().__init__()
        self.frames = frames

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
            name = name_of_operator(func)
            func, args, kwargs = as_function(name, func, args, kwargs)
            if watched is not None and name not in watched and name not in frame.table:
                return func(*args, **kwargs)
        # A call that may be a layer's.
        origin = origin_of_call(frames.graphs, frame.python)
        if origin is not _MODEL:
            if origin is Origin.ENDED:
                frames.drop_ended(stack)
            if origin is Origin.FOREIGN or not stack:
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
        if not stack:
            return func(*args, **kwargs)
        hide_from_graph()
        if name in COMPILED_CHECKPOINTS:
            return func(UnderMode(self, args[0]), *args[1:], **kwargs)
        return self._otherwise(stack, name, func, args, kwargs)

    def _otherwise(self, stack: list[ModuleCall], name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is called by another function, or in another way."""
        if func is Tensor.unflatten:  # its Python half is one that the compiler can't trace under a mode
            func = torch.unflatten
        if name == "multi_head_attention_forward":
            # Its inner matmuls would run with the mode off, out of sight.
            with self:
                return multi_head_attention(*args, **kwargs)
        return self.frames.handle(stack[-1], name, func, args, kwargs)


class Frames(Hooks):
    """The hooks on a model, the frame stack of each thread, and the function mode.

    Args:
        model: Root of the module tree. It is hooked, never changed.
        root: The tree of calls; the capture grows it, the runtime reads it.
        handle: Called for each torch function with ``(frame, function name, function, args, kwargs)``; returns its result.

    Attributes:
        watched: Names of functions that the handler must see even where the frame's table does not have them; `None`: it sees all.
        quiet: Paths of modules in which no call need be seen: the mode is off meanwhile, which is cheaper than to look at each.
        growing: Whether new calls belong to the capture; what turns up later is marked as never captured.
        entered: Called with each frame pushed, and the arguments of its module.
        left: Called with each frame about to be popped, and its module's output.
        started: Called before the first frame of a thread is pushed.
        carried: Called when a checkpoint's forward begins; makes the context in which its recomputation runs.
        owner: Refers to the object that these hooks belong to.
        graphs: Identities of the modules of the model that are graphs of `torch.fx`.
    """

    def __init__(self, model: nn.Module, root: CallNode, handle: Handler) -> None:
        super().__init__(model)
        self.root = root
        self.handle = handle
        self.watched: frozenset[str] | None = None
        self.entered: Callable[[ModuleCall, tuple[Any, ...], dict[str, Any]], None] | None = None
        self.left: Callable[[ModuleCall, Any], None] | None = None
        self.quiet: frozenset[str] = frozenset()
        self.growing = False
        self.started: Callable[[], None] | None = None
        self.carried: Callable[[], Callable[[], AbstractContextManager[None]]] | None = None
        self.owner: weakref.ref[Any] | None = None
        self._mode = _FrameMode(self)
        self._main: list[ModuleCall] = []
        self._thread = get_ident()
        self._others: dict[int, list[ModuleCall]] = {}
        self.graphs: frozenset[int] = frozenset()
        self._entries: dict[str, list[CallNode]] = {}
        self._resuming = 0

    def attach(self) -> None:
        """Hook every submodule, for forwards on this thread above all.

        Raises:
            CCOError: Somebody else's hooks are on, or the installed versions lack something.
        """
        self._thread = get_ident()
        self._entries = {}
        for node in [*self.root.children.values(), *self.root.walk()]:  # calls from outside any frame come first
            known = self._entries.setdefault(node.path, [])
            if node not in known:
                known.append(node)
        self.graphs = frozenset(id(module) for module in self.model.modules() if isinstance(module, GraphModule))
        super().attach()

    def reset(self) -> None:
        """Forget all frames."""
        self._main.clear()
        self._others.clear()
        self._leave_mode()

    def _leave_mode(self) -> None:
        modes = mode_stack()
        if self._mode in modes:
            restore_modes([mode for mode in modes if mode is not self._mode])

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
        """Put frames of an earlier time back inside the block. The backward may run on a thread of its own, or inside of another forward."""
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

    def _node_for_entry(self, path: str) -> CallNode:
        """The node of a module that is called from outside any frame."""
        known = self._entries.get(path)
        if known:
            if len(known) > 1 and not self._resuming and not is_compiling() and graph_task() != -1:
                raise CCOError(
                    f"module '{path}' is run again inside the backward by something that is not torch.utils.checkpoint, and it was captured {len(known)} "
                    "times: nothing tells which of its calls this is, so its quantizers can't be found. Use torch.utils.checkpoint.checkpoint, or "
                    f"skip the module: {{match: '{path}', skip_quantization: true}}."
                )
            return known[0]
        node = self.root.child(path, 0, self.growing) if path else self.root
        self._entries[path] = [node]
        return node

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Push the frame of a module call that begins.

        Returns:
            The keyword arguments to go on with, for a thread's first frame: they end with the call.
        """
        if is_compiling():
            self._enter_compiled(path, module, args, kwargs)
            return None
        stack = self._main if get_ident() == self._thread else self.stack()
        if stack:
            if stack[-1].quiet:  # something has interrupted a quiet module
                self._end_quiet(stack[-1])
            if path in self.quiet and self.watched is not None and function_mode_at(function_mode_count() - 1) is self._mode:
                stack[-1].quiet = True
                pop_function_mode()
                return None
        own: FrameType | None = _getframe(3)  # hooks are called by a function inside of it
        if own is None or own.f_code is not MODULE_CALL:
            own = module_call(_getframe(2))
        if not stack:
            return self._enter_first(path, module, args, kwargs, own)
        above = stack[-1]
        if own is not None and above.python:
            around, running = own.f_back, above.python
            while around is not None and id(around) != running:
                around = around.f_back
            if around is None:
                self.drop_ended(stack)
                if not stack:
                    return self._enter_first(path, module, args, kwargs, own)
                above = stack[-1]
        records = above.records
        if records and (saved_hooks_on_top(False) is not None or not is_grad_enabled()):
            self.note_checkpoint(stack, entering=True)
        index = above.calls.get(path, 0)
        above.calls[path] = index + 1
        node = above.node.children.get((path, index)) or above.node.child(path, index, self.growing)
        frame = ModuleCall(node, module.training, records)
        if own is not None:
            frame.python = id(own)
        stack.append(frame)
        if self.entered is not None:
            self.entered(frame, args, kwargs)
        return None

    def _enter_first(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], own: FrameType | None
    ) -> dict[str, Any] | None:
        """Push a thread's first frame."""
        stack = self.stack()
        records = is_grad_enabled()
        if saved_hooks_on_top(False) is not None or not records:
            self.note_checkpoint(stack, entering=True)
        if self.started is not None:
            self.started()
        self._leave_mode()  # an interrupt may have left it
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        frame = ModuleCall(self._node_for_entry(path), module.training, records)
        replaced = None
        if own is not None:
            frame.python = id(own)
            replaced = Arguments(kwargs)
            frame.token = weakref.ref(replaced, partial(_end_of_call, weakref.ref(self), get_ident()))
        stack.append(frame)
        if self.entered is not None:
            self.entered(frame, args, kwargs)
        return replaced

    def _enter_compiled(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The same while a compiler traces, where there are no Python frames to be seen."""
        stack = self._main
        records = is_grad_enabled()
        if stack:
            node = self._node_within(stack[-1], path)
        else:
            self._mode.__enter__()  # type: ignore[no-untyped-call]
            node = self._node_for_entry(path)
        frame = ModuleCall(node, module.training, records)
        stack.append(frame)
        if self.entered is not None:
            self.entered(frame, args, kwargs)

    def _node_within(self, parent: ModuleCall, path: str) -> CallNode:
        """The node of a module that is called from within another."""
        index = parent.calls.get(path, 0)
        parent.calls[path] = index + 1
        return parent.node.child(path, index, self.growing)

    def leave(self, path: str, output: Any) -> None:
        """Pop the frame of a module call that ends."""
        compiling = is_compiling()
        stack = self._main if compiling or get_ident() == self._thread else self.stack()
        # A user's pre-hook may have raised before ours ran, and a redirected call pushed nothing.
        if not stack:
            return
        frame = stack[-1]
        if frame.quiet:
            self._end_quiet(frame)
            if path in self.quiet:
                return
        if compiling or not frame.python:
            if frame.node.path != path:
                return
        elif id(_getframe(3)) != frame.python and not self._drop_interrupted(stack, path, _getframe(2)):
            return
        if self.left is not None:
            self.left(stack[-1], output)
        stack.pop()
        if not stack:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _end_quiet(self, frame: ModuleCall) -> None:
        frame.quiet = False
        push_function_mode(self._mode)

    def _drop_interrupted(self, stack: list[ModuleCall], path: str, caller: FrameType) -> bool:
        """Whether a call that ends has a frame, and is then the innermost: calls inside of it may have been interrupted, and somebody caught that."""
        own = module_call(caller)
        if own is None:
            return stack[-1].node.path == path
        depth = next((depth for depth, frame in enumerate(stack) if frame.python == id(own)), None)
        if depth is None or stack[depth].node.path != path:
            return False
        del stack[depth + 1 :]
        return True


def _end_of_call(frames: weakref.ref[Frames], thread: int, token: weakref.ref[Arguments]) -> None:
    alive = frames()
    if alive is not None:
        alive._abandoned(thread, token)
