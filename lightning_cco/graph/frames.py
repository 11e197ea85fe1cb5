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
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.fx import GraphModule
from torch.utils.hooks import RemovableHandle

from lightning_cco.compat.autograd import graph_task
from lightning_cco.compat.callers import REDIRECTED_FORWARD
from lightning_cco.compat.modules import MODULE_CALL, forward_pre_hooks
from lightning_cco.compat.resolve import refuse_missing
from lightning_cco.errors import CCOError
from lightning_cco.graph.attention import multi_head_attention
from lightning_cco.graph.compiled import HiddenMode, hide_from_graph, mode_stack, restore_modes
from lightning_cco.graph.foreign import is_foreign
from lightning_cco.graph.recompute import COMPILED_CHECKPOINTS, Resumed, UnderMode, running_checkpoint
from lightning_cco.graph.spelling import as_function, is_operator, name_of_operator

Handler = Callable[["Frame", str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class CallNode:
    """One call of one module within its chain of callers.

    Attributes:
        path: Dotted path of the module; empty for the root.
        index: Which call of this module within the frame of its caller.
        children: The calls made from within this one, by path and index.
        tables: For evaluation (`False`) and training (`True`): what to do with each function, by name. Filled by the runtime.
        seen: Likewise: how often the capture saw each kind of operation.
        captured: Whether the capture saw this call; a call it never saw must not be quantized.
    """

    __slots__ = ("captured", "children", "index", "parent", "path", "seen", "tables")

    def __init__(self, path: str, index: int = 0, parent: CallNode | None = None, captured: bool = True) -> None:
        self.path = path
        self.index = index
        self.parent = parent
        self.captured = captured
        self.children: dict[tuple[str, int], CallNode] = {}
        self.tables: dict[bool, dict[str, Any]] = {False: {}, True: {}}
        self.seen: dict[bool, dict[str, int]] = {False: {}, True: {}}

    def child(self, path: str, index: int, captured: bool) -> CallNode:
        """The node of a call made from within this one, made on first use."""
        node = self.children.get((path, index))
        if node is None:
            node = self.children.setdefault((path, index), CallNode(path, index, self, captured))
        return node

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


class Frame:
    """A module call that is running now: its node, its table of functions, and how often each thing has been called so far.

    Attributes:
        records: Whether gradients were recorded when the outermost frame began.
        python: Identity of the Python frame of the module's call; 0 if unknown, as in compiled code and in a recomputation.
        token: Of a thread's first frame: ends with the Python frame, also where no hook says so.
    """

    __slots__ = ("calls", "counts", "node", "python", "records", "table", "token", "training")

    def __init__(self, node: CallNode, training: bool, records: bool = False) -> None:
        self.node = node
        self.training = training
        self.records = records
        self.table: dict[str, Any] = node.tables[training]
        self.counts: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self.python = 0
        self.token: weakref.ref[_Arguments] | None = None

    def copy(self) -> Frame:
        """The same with counters of its own."""
        twin = Frame(self.node, self.training, self.records)
        twin.counts, twin.calls = dict(self.counts), dict(self.calls)
        return twin


class _FrameMode(HiddenMode):
    """Hands each torch call to the handler, with the frame it belongs to."""

    def __init__(self, frames: Frames) -> None:
        super().__init__()
        self.frames = frames

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        frames = self.frames
        compiling = is_compiling()
        stack = frames._main if compiling or get_ident() == frames._thread else frames.stack()
        name = getattr(func, "__name__", "")
        if not compiling and is_operator(func):
            name = name_of_operator(func)
            func, args, kwargs = as_function(name, func, args, kwargs)
        if not compiling:
            if not stack:
                return func(*args, **kwargs)
            watched = frames.watched
            if watched is not None and name not in watched and name not in stack[-1].table:
                return func(*args, **kwargs)
            if is_foreign(frames.graphs):
                return func(*args, **kwargs)
            python = stack[-1].python
            if python and not _is_running(python):
                frames.drop_ended(stack)
                if not stack:
                    return func(*args, **kwargs)
            if stack[0].records:
                frames.note_checkpoint(stack, entering=False)
        elif not stack:
            return func(*args, **kwargs)
        else:
            hide_from_graph()
            if name in COMPILED_CHECKPOINTS:
                return func(UnderMode(self, args[0]), *args[1:], **kwargs)
        if func is Tensor.unflatten:  # its Python half is one that the compiler can't trace under a mode
            func = torch.unflatten
        if name == "multi_head_attention_forward":
            # Its inner matmuls would run with the mode off, out of sight.
            with self:
                return multi_head_attention(*args, **kwargs)
        return frames.handle(stack[-1], name, func, args, kwargs)


class Frames:
    """The hooks on a model, the frame stack of each thread, and the function mode.

    Args:
        model: Root of the module tree. It is hooked, never changed.
        root: The tree of calls; the capture grows it, the runtime reads it.
        handle: Called for each torch function with ``(frame, function name, function, args, kwargs)``; returns its result.

    Attributes:
        watched: Names of functions that the handler must see even where the frame's table does not have them; `None`: it sees all.
        growing: Whether new calls belong to the capture; what turns up later is marked as never captured.
        entered: Called with each frame pushed, and the arguments of its module.
        left: Called with each frame about to be popped, and its module's output.
        started: Called before the first frame of a thread is pushed.
        carried: Called when a checkpoint's forward begins; makes the context in which its recomputation runs.
        owner: Refers to the object that these hooks belong to.
        graphs: Identities of the modules of the model that are graphs of `torch.fx`.
    """

    def __init__(self, model: nn.Module, root: CallNode, handle: Handler) -> None:
        self.model = model
        self.root = root
        self.handle = handle
        self.watched: frozenset[str] | None = None
        self.entered: Callable[[Frame, tuple[Any, ...], dict[str, Any]], None] | None = None
        self.left: Callable[[Frame, Any], None] | None = None
        self.growing = False
        self.started: Callable[[], None] | None = None
        self.carried: Callable[[], Callable[[], AbstractContextManager[None]]] | None = None
        self.owner: weakref.ref[Any] | None = None
        self._mode = _FrameMode(self)
        self._main: list[Frame] = []
        self._thread = get_ident()
        self._others: dict[int, list[Frame]] = {}
        self.graphs: frozenset[int] = frozenset()
        self._handles: list[RemovableHandle] = []
        self._entries: dict[str, list[CallNode]] = {}
        self._resuming = 0

    def attach(self) -> None:
        """Hook every submodule. Code compiled before that runs on without the hooks, so it is dropped.

        Raises:
            CCOError: Somebody else's hooks are on, or the installed versions lack something.
        """
        refuse_missing()
        refuse_hooked(self.model)
        self._thread = get_ident()
        self._entries = {}
        for node in [*self.root.children.values(), *self.root.walk()]:  # calls from outside any frame come first
            known = self._entries.setdefault(node.path, [])
            if node not in known:
                known.append(node)
        self.graphs = frozenset(id(module) for module in self.model.modules() if isinstance(module, GraphModule))
        for path, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            self._handles.append(module.register_forward_pre_hook(_Enter(self, path), prepend=True, with_kwargs=True))
            self._handles.append(module.register_forward_hook(_Leave(self, path), always_call=True))
        torch.compiler.reset()

    def detach(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.reset()
        torch.compiler.reset()

    @property
    def attached(self) -> bool:
        """Whether the hooks are on."""
        return bool(self._handles)

    def reset(self) -> None:
        """Forget all frames."""
        self._main.clear()
        self._others.clear()
        self._leave_mode()

    def _leave_mode(self) -> None:
        modes = mode_stack()
        if self._mode in modes:
            restore_modes([mode for mode in modes if mode is not self._mode])

    def drop_ended(self, stack: list[Frame]) -> None:
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

    def _abandoned(self, thread: int, token: weakref.ref[_Arguments]) -> None:
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

    def stack(self) -> list[Frame]:
        """Frames of the current thread, the innermost last; autograd recomputes checkpoints on threads of its own."""
        if is_compiling() or get_ident() == self._thread:
            return self._main
        return self._others.setdefault(get_ident(), [])

    def note_checkpoint(self, stack: list[Frame], entering: bool) -> None:
        """If a checkpoint's forward has just begun, let its recomputation begin with the same frames."""
        found = running_checkpoint(entering)
        if found is None:
            return
        checkpoint, attribute = found
        function = getattr(checkpoint, attribute)
        if not (isinstance(function, Resumed) and function.belongs_to(self)):
            if self.carried is not None:
                function = _InContext(self.carried(), function)
            setattr(checkpoint, attribute, Resumed(self, [frame.copy() for frame in stack], function))

    @contextmanager
    def resumed(self, saved: list[Frame]) -> Iterator[None]:
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
        compiling = is_compiling()
        stack = self._main if compiling or get_ident() == self._thread else self.stack()
        own = None if compiling else _module_call(sys._getframe(2))
        if own is not None and stack and stack[-1].python:
            around = _module_call(own.f_back)
            if around is None or id(around) != stack[-1].python:
                self.drop_ended(stack)
        records = stack[0].records if stack and not compiling else torch.is_grad_enabled()
        if not compiling and (not stack or stack[0].records):
            self.note_checkpoint(stack, entering=True)
        if stack:
            parent = stack[-1]
            index = parent.calls.get(path, 0)
            parent.calls[path] = index + 1
            node = parent.node.child(path, index, self.growing)
        else:
            if not compiling:
                if self.started is not None:
                    self.started()
                self._leave_mode()  # an interrupt may have left it
            self._mode.__enter__()  # type: ignore[no-untyped-call]
            node = self._node_for_entry(path)
        frame = Frame(node, module.training, records)
        replaced = None
        if own is not None:
            frame.python = id(own)
            if not stack:
                replaced = _Arguments(kwargs)
                frame.token = weakref.ref(replaced, partial(_end_of_call, weakref.ref(self), get_ident()))
        stack.append(frame)
        if self.entered is not None:
            self.entered(frame, args, kwargs)
        return replaced

    def leave(self, path: str, output: Any) -> None:
        """Pop the frame of a module call that ends."""
        compiling = is_compiling()
        stack = self._main if compiling or get_ident() == self._thread else self.stack()
        # A user's pre-hook may have raised before ours ran, and a redirected call pushed nothing.
        if not stack:
            return
        own = None if compiling else _module_call(sys._getframe(2))
        if own is None or not stack[-1].python:
            if stack[-1].node.path != path:
                return
        elif stack[-1].python != id(own):
            # Calls inside of this one were interrupted, and somebody caught that; or this one pushed nothing.
            depth = next((depth for depth, frame in enumerate(stack) if frame.python == id(own)), None)
            if depth is None or stack[depth].node.path != path:
                return
            del stack[depth + 1 :]
        if self.left is not None:
            self.left(stack[-1], output)
        stack.pop()
        if not stack:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Arguments(dict[str, Any]):
    """Keyword arguments that can be referred to weakly: the call of a module holds them as long as it runs."""


def _end_of_call(frames: weakref.ref[Frames], thread: int, token: weakref.ref[_Arguments]) -> None:
    alive = frames()
    if alive is not None:
        alive._abandoned(thread, token)


class _InContext:
    """Runs a function in a context."""

    def __init__(self, context: Callable[[], AbstractContextManager[None]], function: Callable[..., Any]) -> None:
        self.context, self.function = context, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.context():
            return self.function(*args, **kwargs)


def hooks_on(model: nn.Module) -> Frames | None:
    """The hooks that a model, or a part of it, carries."""
    for module in model.modules():
        for hook in forward_pre_hooks(module):
            if isinstance(hook, _Enter):
                return hook.frames
    return None


def refuse_hooked(model: nn.Module) -> None:
    """Raise if a model is quantized already, whole or in part.

    Raises:
        CCOError: It is.
    """
    found = hooks_on(model)
    if found is None:
        return
    what = "it" if found.model is model else f"{type(found.model).__name__}, which shares modules with it,"
    raise CCOError(
        f"{type(model).__name__}: {what} is quantized already, and can be only once. Take the hooks off first: call .remove() on what quantize() returned, or "
        "on the callback's .quantized. To change the recipe and keep the ranges, call .replan(settings) on it instead."
    )


class _Enter:
    """Forward pre-hook of one module. A pickled module carries an inert one: the copy is the plain float model."""

    def __init__(self, frames: Frames, path: str) -> None:
        self.frames, self.path = frames, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.path == "" and not is_compiling() and _is_redirected(module):
            return None
        kept = self.frames.enter(self.path, module, args, kwargs)
        return None if kept is None else (args, kept)

    def __getattr__(self, name: str) -> Any:
        return _refuse_scripting(name)

    def __reduce__(self) -> Any:
        return _inert, ()


class _Leave:
    """Forward hook of one module."""

    def __init__(self, frames: Frames, path: str) -> None:
        self.frames, self.path = frames, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.frames.leave(self.path, output)

    def __getattr__(self, name: str) -> Any:
        return _refuse_scripting(name)

    def __reduce__(self) -> Any:
        return _inert, ()


def _refuse_scripting(name: str) -> Any:
    if name == "__name__" and sys._getframe(2).f_globals.get("__name__", "").startswith("torch.jit"):
        raise CCOError(
            "torch.jit.script (to_torchscript() without method='trace'): a quantized model can't be scripted, since a script has no hooks. Write an INT8 file "
            "by export(path), trace the model by torch.jit.trace or to_torchscript(method='trace'), or take the hooks off by remove() first."
        )
    raise AttributeError(name)


def _inert() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    return None


def _is_redirected(module: nn.Module) -> bool:
    """Whether a strategy borrows the module's ``forward`` to run something else, such as ``training_step`` under DDP.

    What the step does around the model is not the model: it must neither be quantized nor shift the indices of what is.
    """
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__name__", "") == REDIRECTED_FORWARD


def _module_call(frame: FrameType | None) -> FrameType | None:
    """The innermost call of a module around a Python frame."""
    while frame is not None and frame.f_code is not MODULE_CALL:
        frame = frame.f_back
    return frame


def _is_running(python: int) -> bool:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if id(frame) == python:
            return True
        frame = frame.f_back
    return False


def calling_position() -> int:
    """Where in the user's code the torch call now running stands: an offset into the code of the innermost function that isn't PyTorch's or ours.

    -1 if the module that runs now has no such code: one of PyTorch's, or a subclass that inherits its ``forward``. Who calls the module tells nothing.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("torch.", "lightning_cco.")):
        if frame.f_code is MODULE_CALL:
            return -1
        frame = frame.f_back
    return frame.f_lasti
