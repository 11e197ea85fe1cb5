"""Frames: which call of which module a torch function belongs to.

Each submodule gets a forward pre-hook and an ``always_call`` forward hook that push and pop a frame.

A call is identified by the chain of modules it runs in, each with its call index inside the module above, by its function, and by the index of
that function within the frame. Shapes, batch size and what other modules do have no say in it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from threading import get_ident
from types import FrameType
from typing import Any

from torch import is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.fx import GraphModule, Proxy

from lightning_cco.compat.autograd import graph_task, saved_hooks_on_top
from lightning_cco.compat.dynamo import traces_a_body
from lightning_cco.compat.modules import MODULE_CALL
from lightning_cco.compat.torch_modes import pop_function_mode, push_function_mode
from lightning_cco.errors import CCOError
from lightning_cco.graph.call_node import Arguments, CallNode, ModuleCall
from lightning_cco.graph.compiled import innermost_mode
from lightning_cco.graph.frame_stacks import FrameStacks, Handler
from lightning_cco.graph.hooks import inert as _inert  # noqa: F401, models pickled by earlier versions name it here
from lightning_cco.graph.python_calls import called_by_graph, module_call
from lightning_cco.names import is_within

_getframe = sys._getframe

_TRACE_OTHERWISE = (
    "Trace the quantized model by torch.fx.experimental.proxy_tensor.make_fx or torch.export instead, make the graph of a copy (copy.deepcopy gives the float "
    "model), or take quantization off first: remove()."
)


class Frames(FrameStacks):
    """The hooks on a model: they push and pop a frame for each call of a module.

    Args:
        model: Root of the module tree. It is hooked, never changed.
        root: The tree of calls; the capture grows it, the runtime reads it.
        handle: Called for each torch function with ``(frame, function name, function, args, kwargs)``; returns its result.

    Attributes:
        unwatched: Paths of modules in which no call need be seen: the mode is off meanwhile, which is cheaper than to look at each.
        growing: Whether new calls belong to the capture; what turns up later is marked as never captured.
        entered: Called with each frame pushed, and the arguments of its module.
        left: Called with each frame about to be popped, and its module's output.
        confused: Called with a frame and a module that it calls, where a loop has not called before it what it did in the capture.
        apart: Called with the path of each module that a forward calls in another thread than its own; such calls then get no frame.
        partly_apart: Modules that a forward calls in its own thread and in others: the calls in others, which the capture did not see, get no frame.
        owner: Refers to the object that these hooks belong to.
    """

    def __init__(self, model: nn.Module, root: CallNode, handle: Handler) -> None:
        super().__init__(model, handle)
        self.root = root
        self.entered: Callable[[ModuleCall, tuple[Any, ...], dict[str, Any]], None] | None = None
        self.left: Callable[[ModuleCall, Any], None] | None = None
        self.apart: Callable[[str], None] | None = None
        self.confused: Callable[[ModuleCall, CallNode], None] | None = None
        self.partly_apart: tuple[str, ...] = ()
        self.unwatched: frozenset[str] = frozenset()
        self.growing = False
        self.owner: weakref.ref[Any] | None = None
        self._entries: dict[str, list[CallNode]] = {}

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

    def forget_what_ran(self) -> None:
        """Forget which modules have run, and whether a compiled graph has."""
        self.graph_ran = False
        for node in self.root.walk():
            node.ran = False

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
            if stack[-1].unwatched:  # something has interrupted an unwatched module
                self._watch_again(stack[-1])
            if path in self.unwatched and self.watched is not None and not self._below and innermost_mode() is self._mode:
                self._unwatch(stack[-1], path)
                return None
        own: FrameType | None = _getframe(3)  # hooks are called by a function inside of it
        if own is None or own.f_code is not MODULE_CALL:
            own = module_call(_getframe(2))
        if not stack:
            return self._enter_first(path, module, args, kwargs, own)
        above = stack[-1]
        if own is not None and above.python and not _runs_inside(own, above.python):
            self.drop_ended(stack)
            if not stack:
                return self._enter_first(path, module, args, kwargs, own)
            above = stack[-1]
        records = above.records
        if records and (saved_hooks_on_top(False) is not None or not is_grad_enabled()):
            self.note_checkpoint(stack, entering=True)
        node = self._node_within(above, path)
        node.ran = True
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
        if self.apart is not None and self._runs_elsewhere(path):
            self.apart(path)
            return None
        if self.partly_apart and is_within(path, self.partly_apart) and (self._runs_elsewhere(path) or self._recomputes_alone()):
            return None
        if any(isinstance(value, Proxy) for value in (*args, *kwargs.values())):
            raise CCOError(
                f"module '{path or 'the root module'}' of a quantized model is traced by torch.fx, which has no values to round. {_TRACE_OTHERWISE}"
            )
        if path and own is not None and called_by_graph(own):
            self._refuse_graph_around(path, module.training)
        records = is_grad_enabled()
        if saved_hooks_on_top(False) is not None or not records:
            self.note_checkpoint(stack, entering=True)
        if self.started is not None:
            self.started()
        self._leave_mode()  # an interrupt may have left it
        if records or not self.passes():
            self._enter_mode()
        node = self._node_for_entry(path)
        node.ran = True
        frame = ModuleCall(node, module.training, records)
        replaced = None
        if own is not None:
            frame.python = id(own)
            replaced = Arguments(kwargs)
            frame.token = weakref.ref(replaced, partial(_end_of_call, weakref.ref(self), get_ident()))
        stack.append(frame)
        if self.entered is not None:
            self.entered(frame, args, kwargs)
        return replaced

    def _runs_elsewhere(self, path: str) -> bool:
        """Whether a module around this one is running in another thread, which has handed this call to a worker. Autograd's own threads recompute."""
        if graph_task() != -1:
            return False
        outer = [stack[0].node.path for stack in (self._main, *list(self._others.values())) if stack]
        return any(path != around and (not around or path.startswith(f"{around}.")) for around in outer)

    def _recomputes_alone(self) -> bool:
        """Whether a checkpoint runs again whose forward had no frames."""
        return graph_task() != -1 and not self._resuming

    def _refuse_graph_around(self, path: str, training: bool) -> None:
        """A graph that somebody's `torch.fx` made of the model calls its modules, but not those around them, where something may be rounded.

        Raises:
            CCOError: Something is.
        """
        for node in self.root.walk():
            around = not node.path or path.startswith(f"{node.path}.")
            if around and any(entry.sites for entry in node.tables[training].values()):
                raise CCOError(
                    f"module '{path}' is called by a graph of torch.fx that was made of the quantized model: what '{node.path or 'the root module'}' computes "
                    f"between its modules would run in float there. {_TRACE_OTHERWISE}"
                )

    def _enter_compiled(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The same while a compiler traces, where there are no Python frames to be seen."""
        if traces_a_body():
            return
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
        """The node of a module that is called from within another, which counts the calls after it anew if they are those of a loop."""
        index = parent.calls.get(path, 0)
        parent.calls[path] = index + 1
        node = parent.node.children.get((path, index)) or parent.node.child(path, index, self.growing)
        if node.start is not None:
            if self.confused is not None and not parent.is_ready(node.start) and not is_compiling():
                self.confused(parent, node)
            parent.begin(node.start)
        return node

    def leave(self, path: str, output: Any) -> None:
        """Pop the frame of a module call that ends."""
        compiling = is_compiling()
        if compiling and traces_a_body():
            return
        stack = self._main if compiling or get_ident() == self._thread else self.stack()
        # A user's pre-hook may have raised before ours ran, and a redirected call pushed nothing.
        if not stack:
            return
        frame = stack[-1]
        if frame.unwatched:
            self._watch_again(frame)
            if path in self.unwatched:
                return
        if compiling or not frame.python:
            if frame.node.path != path:
                return
        elif id(_getframe(3)) != frame.python and not self._drop_interrupted(stack, path, _getframe(2)):
            return
        if self.left is not None:
            self.left(stack[-1], output)
        stack.pop()
        if not stack and self._below:
            self._below.pop(get_ident(), None)
        if not stack and (compiling or innermost_mode() is self._mode):
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _unwatch(self, frame: ModuleCall, path: str) -> None:
        if frame.node.loops:
            self._node_within(frame, path)
        frame.unwatched = True
        pop_function_mode()

    def _watch_again(self, frame: ModuleCall) -> None:
        frame.unwatched = False
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


def _runs_inside(own: FrameType, running: int) -> bool:
    """Whether a call was made, however far below, by the call whose Python frame has this identity."""
    around = own.f_back
    while around is not None and id(around) != running:
        around = around.f_back
    return around is not None
