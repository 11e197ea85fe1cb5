"""One forward, written down: the modules that ran, the calls that are the network, its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.distributed.tensor import DTensor

from lightning_cco.graph.call import Call, Read
from lightning_cco.graph.call_node import CallNode, ModuleCall
from lightning_cco.graph.call_tracer import CallTracer
from lightning_cco.graph.carried_state import NOTHING, Carried, KeptConstant
from lightning_cco.graph.compiled import BlockMode, HiddenMode
from lightning_cco.graph.containers import tensors_held
from lightning_cco.graph.frames import Frames
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.network import End, OuterCall, find_network, has_parameters, is_metric
from lightning_cco.graph.operands import dtype_name, is_quantizable
from lightning_cco.graph.operator_calls import as_function, is_operator
from lightning_cco.graph.ops import Category, Op
from lightning_cco.graph.outside_readers import looked_at, read_outside, with_reader
from lightning_cco.graph.records import refuse_tensors


class Tracer:
    """Watches one forward and collects its calls. `calls` is in execution order, inputs included, outputs last.

    Attributes:
        calls: What was seen.
        ran: Paths of the modules that ran.
        with_gradients: Paths of those that ran while gradients were recorded.
        read: Names of the parameters that a call has read.
        custom: Kinds of the layers that custom operators are.
        drawn: Paths of the modules that compute with parameters which the forward itself has drawn at random.
        left_out: Paths of modules with parameters whose calls serve losses alone.
        called: Paths of the modules that are called from outside of any other for the network.
        apart: Paths of the modules that the forward calls in other threads.
    """

    def __init__(self, model: nn.Module, root: CallNode, carried: Carried = NOTHING) -> None:
        self.model = model
        self.ran: set[str] = set()
        self.with_gradients: set[str] = set()
        self.left_out: list[str] = []
        self.called: tuple[str, ...] = ()
        self.apart: set[str] = set()
        self._outer: list[OuterCall] = []
        self._traced = CallTracer(model, root, carried, self._outer)
        self.custom = self._traced.custom
        self.calls, self.read, self.drawn, self.made_of = self._traced.calls, self._traced.read, self._traced.drawn, self._traced.made_of
        self.frames = Frames(model, root, self._traced.handle)
        self.frames.growing = True
        self.frames.entered, self.frames.left, self.frames.apart = self._entered, self._left, self.apart.add
        self._modules = dict(model.named_modules())
        self._sources, self._readers = self._traced.sources, self._traced.readers
        self._origins = self._sources.origins

    def find_loops(self) -> None:
        """Of the forward in evaluation mode, before that in training mode."""
        self._traced.loops.find(self.frames.root, self.calls)

    @property
    def hooked(self) -> frozenset[str]:
        """Paths of the modules with hooks that may read what passes."""
        return self._readers.hooked

    @property
    def kept_read(self) -> list[KeptConstant]:
        """The constants of earlier forwards that this one read as they were."""
        return self._sources.kept_read

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook the model, watch the forward inside the block, take the hooks off."""
        self.frames.attach()
        try:
            with _Between(self):
                yield
            self._traced.end()
            self._finish()
        finally:
            self._traced.end()
            self.frames.detach()

    def _entered(self, frame: ModuleCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ran.add(frame.node.path)
        self._readers.note_passed(frame.node.path, [args, kwargs])
        if torch.is_grad_enabled():
            self.with_gradients.add(frame.node.path)
        stack = self.frames.stack()
        if len(stack) > 1:
            if not self.model.training:
                self._traced.loops.note_module(stack[-2], frame.node)
            return
        module = self._modules[frame.node.path]
        with torch.DisableTorchFunction():
            learned = (has_parameters(module) or not has_parameters(self._modules[""])) and not is_metric(module)
        self._outer.append(OuterCall(frame.node.path, module, len(self.calls), learned))
        if not learned:
            return
        with torch.DisableTorchFunction():  # what this looks at is no part of the model
            given = tensors_held([args, kwargs])
            # What is cut over processes may be put together first; the others have no size to write down.
            refuse_tensors(frame.node.path, "forward", [tensor for _, tensor in given if not isinstance(tensor, DTensor)])
            for way, tensor in given:
                if self._origins.of(tensor) is None or (not frame.node.path and self._sources.is_attribute(tensor)):
                    self._sources.remember_input(tensor, ".".join(str(part) for part in way[1:]))

    def _left(self, frame: ModuleCall, output: Any) -> None:
        seen = frame.node.seen[frame.training]
        for kind, count in frame.counts.items():
            seen[kind] = max(count, seen.get(kind, 0))
        self._readers.note_passed(frame.node.path, output)
        if len(self.frames.stack()) == 1:
            outer = self._outer[-1]
            with torch.DisableTorchFunction():
                for way, tensor in tensors_held(output):
                    if outer.learned or self._origins.of(tensor) is not None:
                        end = End(".".join(map(str, way)), tuple(tensor.shape), dtype_name(tensor), is_quantizable(tensor))
                        outer.returned.append((end, self._sources.find(tensor, frame)))
            outer.end = len(self.calls)
            self._traced.alive.append(output)  # an origin is known as long as its tensor lives

    def _finish(self) -> None:
        """Keep what is the network, and add its outputs."""
        self._traced.note_drawn()
        network = find_network(self._outer, self.calls)
        for number, output in self._readers.found(network):
            with_reader(self.calls[number], output)
        self.left_out, self.called = network.left_out, network.called
        self._forget_measures(network.calls)
        renumbered = {number: position for position, number in enumerate(sorted(network.calls))}
        self.calls = [self.calls[number] for number in renumbered]
        for call in self.calls:
            call.reads = [replace(read, source=renumbered[read.source]) for read in call.reads]
        for (number, output), end in network.ends.items():
            layer = Layer("", "", "output", (end.shape,), (end.shape,), (end.dtype,), (), {"key": end.key} if end.key else {})
            call = Call(layer, self.frames.root, "", Op("output", Category.COMPUTE), 0, visible=False)
            call.reads = [Read((0,), renumbered[number], output, end.quantizable)]
            self.calls.append(call)
        aside = read_outside(self.calls)
        for number in aside:
            self.calls[number].layer = replace(self.calls[number].layer, beside=True)
        for number, output in looked_at(aside, self.calls):
            with_reader(self.calls[number], output)

    def _forget_measures(self, kept: set[int]) -> None:
        """What a loss or a metric without parameters calls is left out, however often that is."""
        nodes = {id(self.calls[number].node) for number in kept}
        for outer in self._outer:
            node = next((n for n in self.frames.root.children.values() if n.path == outer.path), None)
            if outer.path and node is not None and not has_parameters(outer.module):
                below = node.walk()
                if not any(id(one) in nodes for one in below):
                    for one in below:
                        one.captured = False

    def between(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look at a call that the step itself makes, outside of any module."""
        name = getattr(func, "__name__", "")
        if self.frames.stack() or is_compiling():
            return func(*args, **kwargs)
        if is_operator(func):
            name, func, args, kwargs = as_function(func, args, kwargs)
        result = self._traced.handle(self._traced.between, name, func, args, kwargs)
        self._traced.alive.append(result)
        return result


class _Between(BlockMode, HiddenMode):
    """Shows a tracer what the step itself calls."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return self.tracer.between(func, args, kwargs or {})
