"""One forward, written down: every layer, what it read and from where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from lightning_cco.compat.autograd import applied
from lightning_cco.graph.beside import ValueReaders, beside, looked_at, with_reader
from lightning_cco.graph.call import Call, Read
from lightning_cco.graph.call_node import CallNode, ModuleCall
from lightning_cco.graph.carried import NOTHING, Carried, KeptConstant, drawn_apart
from lightning_cco.graph.compiled import HiddenMode
from lightning_cco.graph.containers import tensors_held, tensors_in
from lightning_cco.graph.custom_functions import CustomCall, running_function
from lightning_cco.graph.frames import Frames
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.network import End, OuterCall, find_network, has_parameters, is_metric
from lightning_cco.graph.operands import dtype_name, is_attention_mask, is_mask_like, is_quantizable, operands_of
from lightning_cco.graph.ops import DRAWS_WEIGHTS, MAKES_OF_DATA, OVERWRITES, RANDOM, READS_OUT, READS_VALUES, Category, Op, operation
from lightning_cco.graph.origins import DRAWN, Origin, is_constant
from lightning_cco.graph.records import Operand, Seen, refuse_operands
from lightning_cco.graph.sources import Sources, names_of
from lightning_cco.graph.spelling import as_function, is_operator, name_of_operator


class Tracer:
    """Watches one forward and collects its calls. `calls` is in execution order, inputs included, outputs last.

    Attributes:
        calls: What was seen.
        ran: Paths of the modules that ran.
        with_gradients: Paths of those that ran while gradients were recorded.
        read: Names of the parameters that a call has read.
        drawn: Paths of the modules that compute with parameters which the forward itself has drawn at random.
        left_out: Paths of modules with parameters whose calls serve losses alone.
        called: Paths of the modules that are called from outside of any other for the network.
    """

    def __init__(self, model: nn.Module, root: CallNode, carried: Carried = NOTHING) -> None:
        self.model = model
        self.calls: list[Call] = []
        self.ran: set[str] = set()
        self.with_gradients: set[str] = set()
        self.read: set[str] = set()
        self.drawn: dict[str, None] = {}
        self.left_out: list[str] = []
        self.called: tuple[str, ...] = ()
        self.frames = Frames(model, root, self._handle)
        self.frames.growing = True
        self.frames.entered, self.frames.left = self._entered, self._left
        self._modules = dict(model.named_modules())
        self._values_left = False
        self._drawn_apart: dict[int, tuple[str, ...]] = {}
        self._function: tuple[FrameType, CustomCall] | None = None
        self._outer: list[OuterCall] = []
        self._between = ModuleCall(CallNode(""), False)
        self._alive: list[Any] = []
        self._sources = Sources(model, root, self.calls, self._between, carried)
        self._origins = self._sources.origins
        self._readers = ValueReaders(model, self._origins, self.calls)

    @property
    def hooked(self) -> frozenset[str]:
        """Paths of the modules with hooks that may read what passes."""
        return self._readers.hooked

    @property
    def kept_read(self) -> list[KeptConstant]:
        """The constants of earlier forwards that this one read as they were."""
        return self._sources.kept_read

    def made_of(self, tensor: Tensor) -> tuple[str, ...] | None:
        """Names of the parameters that a tensor is made of in this forward; `None` if it depends on the model's inputs, or nobody knows.

        Random numbers that the forward has drawn depend on none.
        """
        found: list[str] = []
        for origin in self._origins.all_of(tensor):
            names = origin if is_constant(origin) else self._drawn_apart.get(origin[0]) if isinstance(origin, tuple) else None
            if names is None:
                return None
            found += names
        return tuple(dict.fromkeys(found))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook the model, watch the forward inside the block, take the hooks off."""
        self.frames.attach()
        try:
            with _Between(self):
                yield
            self._function = None
            self._alive.clear()
            self._finish()
        finally:
            self._function = None
            self._alive.clear()
            self.frames.detach()

    def _entered(self, frame: ModuleCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ran.add(frame.node.path)
        self._readers.note_passed(frame.node.path, [args, kwargs])
        if torch.is_grad_enabled():
            self.with_gradients.add(frame.node.path)
        if len(self.frames.stack()) > 1:
            return
        module = self._modules[frame.node.path]
        with torch.DisableTorchFunction():
            learned = (has_parameters(module) or not has_parameters(self._modules[""])) and not is_metric(module)
        self._outer.append(OuterCall(frame.node.path, module, len(self.calls), learned))
        if not learned:
            return
        with torch.DisableTorchFunction():  # what this looks at is no part of the model
            for way, tensor in tensors_held([args, kwargs]):
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
            self._alive.append(output)  # an origin is known as long as its tensor lives

    def _finish(self) -> None:
        """Keep what is the network, and add its outputs."""
        self._drawn_apart = drawn_apart(self.calls)
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
        aside = beside(self.calls)
        for number in aside:
            self.calls[number].layer = replace(self.calls[number].layer, beside=True)
        for number, output in looked_at(aside, self.calls):
            with_reader(self.calls[number], output)

    def _forget_measures(self, kept: set[int]) -> None:
        """What a loss or a metric without parameters calls is nobody's business, however often that is."""
        nodes = {id(self.calls[number].node) for number in kept}
        for outer in self._outer:
            node = next((n for n in self.frames.root.children.values() if n.path == outer.path), None)
            if outer.path and node is not None and not has_parameters(outer.module):
                below = node.walk()
                if not any(id(one) in nodes for one in below):
                    for one in below:
                        one.captured = False

    # The calls

    def _operands(self, frame: ModuleCall, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Operand]:
        if name.endswith("_like") or name.startswith("new_"):
            return []  # they read shapes and types
        found = operands_of(args, kwargs)
        if name in OVERWRITES and name.endswith("_") and args and self._is_overwritten(args[0]):
            found = [(slot, tensor) for slot, tensor in found if slot != (0,)]
        if name == "__setitem__" and isinstance(args[2], Tensor) and self._origins.of(args[0]) is not None:
            # ``y[:, 1:3] += 1`` assigns what has just been written there.
            value = self._sources.find(args[2], frame)
            if self._origins.writes_since(args[0]) == [value]:
                return [
                    (slot, t, self._sources.resolved(self._origins.of(t), t) if t is args[0] else self._sources.find(t, frame))
                    for slot, t in found
                ]
        return [(slot, t, self._sources.find(t, frame)) for slot, t in found]

    def _is_overwritten(self, tensor: Any) -> bool:
        """Whether what a tensor held before a call that writes all of it comes from no layer, so that nobody need know."""
        origins = self._origins.all_of(tensor)
        return all(origin is None or is_constant(origin) or self._is_unseen(origin) for origin in origins)

    def _is_unseen(self, origin: Origin) -> bool:
        return not isinstance(origin, CustomCall) and self.calls[origin[0]].layer.kind in ("unseen", "written")

    def _handle(self, frame: ModuleCall, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args and getattr(func, "__module__", "") == "torch.nn.init" and "tensor" in kwargs:
            args, kwargs = (kwargs["tensor"],), {key: value for key, value in kwargs.items() if key != "tensor"}
        op = operation(name)
        function = running_function()
        if function is not None:
            return self._inside(function, frame, op, func, args, kwargs)
        self._function = None
        if not self._is_of_network(frame, args, kwargs):
            self._count(frame, op)
            return func(*args, **kwargs)
        # In-place calls overwrite what they read: look at the operands first.
        operands = self._operands(frame, name, args, kwargs)
        refuse_operands(f"module '{frame.node.path}': its '{op.kind}'", operands)
        if op.category is not Category.ALIAS and name not in READS_VALUES:  # which hand values on, to whoever then computes with them
            self.read.update(parameter for _, _, origin in operands if is_constant(origin) for parameter in origin)
        mask_like = any(is_constant(origin) and not is_attention_mask(op, slot) and is_mask_like(t) for slot, t, origin in operands)
        versions = [_version(tensor) for _, tensor in operands_of(args, kwargs)]
        result = func(*args, **kwargs)
        seen = Seen(frame, name, op, -1, args, kwargs, [], operands, mask_like)
        self._note_values_read(seen, result)
        if op.category is Category.ALIAS:
            self._note_alias(seen, result)
            return result
        seen.index = self._count(frame, op)
        if name == "__set__" and getattr(getattr(func, "__self__", None), "__name__", "") == "data":
            self._origins.remember(args[0], operands[1][2])
            return result
        written = [t for (_, t), before in zip(operands_of(args, kwargs), versions, strict=True) if before not in (None, _version(t))]
        self._note_result(seen, result, written)
        return result

    def _note_values_read(self, seen: Seen, result: Any) -> None:
        """Note values that leave the tensors, and floats whose very values are read."""
        if seen.function in READS_OUT and any(not is_constant(o) and t.is_floating_point() for _, t, o in seen.operands):
            self._values_left = True
        makes_no_floats = seen.op.category is Category.ALIAS and isinstance(result, Tensor) and not result.is_floating_point()
        if seen.frame is not self._between and (seen.function in READS_VALUES or makes_no_floats):
            self._readers.note_read_out(seen.operands)

    def _note_alias(self, seen: Seen, result: Any) -> None:
        """A call that gives its argument's values: no layer, unless it makes floats of others."""
        if not isinstance(result, Tensor) or not seen.operands:
            return
        _, target, origin = seen.operands[0]
        if result.is_floating_point() and not target.is_floating_point():
            # Floats made of integers or complex numbers: consumers quantize them, as they do inputs.
            index = seen.frame.counts.get("cast", 0)
            self._record(replace(seen, op=Op("cast", Category.COMPUTE), index=index, outputs=[result], visible=False))
        elif self._origins.of(result) is None:
            self._origins.remember(result, origin)
            if seen.function in ("clone", "__deepcopy__") and is_constant(origin) and origin:
                self._alive.append(result)  # `nn.Parameter(copy)` and `copy.deepcopy` make another tensor in its memory

    def _note_result(self, seen: Seen, result: Any, written: list[Tensor]) -> None:
        """Add a call by what it gives: its result, or what it has written to.

        Args:
            seen: The call, without outputs yet.
            result: What it returned.
            written: The operands whose memory has changed.
        """
        outputs = [seen.args[0]] if seen.function == "__setitem__" else [tensor for _, tensor in tensors_in(result)]
        given = [tensor for _, tensor in tensors_in(seen.kwargs.get("out"))]
        in_place = bool(seen.args and outputs) and outputs[0] is seen.args[0]
        if given:
            written = given
        elif in_place:
            written = [t for t in written if t is seen.args[0]]
        elif seen.op.kind in ("batch_norm", "instance_norm"):
            written = []  # statistics of training
        outputs = outputs or written
        if not outputs:
            return
        origins = self._record(replace(seen, outputs=outputs, writes=bool(written) and not in_place))
        for tensor in written:
            known = self._origins.of(tensor) is not None
            self._origins.note_write(tensor, origins[0], whole=in_place and seen.function in OVERWRITES)
            if not known or in_place:
                self._origins.remember(tensor, origins[0])

    def between(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look at a call that the step itself makes, outside of any module."""
        name = getattr(func, "__name__", "")
        if self.frames.stack() or is_compiling():
            return func(*args, **kwargs)
        if is_operator(func):
            name = name_of_operator(func)
            func, args, kwargs = as_function(name, func, args, kwargs)
        result = self._handle(self._between, name, func, args, kwargs)
        self._alive.append(result)
        return result

    def _is_of_network(self, frame: ModuleCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call may belong to the network: in a module with parameters, or on what comes from one or from a parameter."""
        if frame is not self._between and self._outer and self._outer[-1].learned:
            return True
        if frame is not self._between and self._outer and is_metric(self._outer[-1].module):
            return False
        origins = (self._origins.of(tensor) for _, tensor in operands_of(args, kwargs))
        return any(origin is not None and (not is_constant(origin) or origin != ()) for origin in origins)

    def _count(self, frame: ModuleCall, op: Op) -> int:
        index = frame.counts.get(op.kind, 0)
        frame.counts[op.kind] = index + 1
        return index

    def _inside(
        self, function: FrameType, frame: ModuleCall, op: Op, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call within a custom function. The mode sees it at run time too, so it is counted here, but it is no layer."""
        if self._function is None or self._function[0] is not function:
            kind, its_args, its_kwargs = applied(function)
            given = operands_of(its_args, its_kwargs)
            custom = CustomCall(kind.__name__, frame.node, [self._sources.find(tensor, frame) for _, tensor in given])
            self._function = function, custom
        custom = self._function[1]
        if op.category is not Category.ALIAS:
            self._count(frame, op)
        operands = [tensor for _, tensor in operands_of(args, kwargs)]
        versions = [_version(tensor) for tensor in operands]
        result = func(*args, **kwargs)
        for tensor, before in zip(operands, versions, strict=True):
            if before is not None and _version(tensor) != before:
                self._origins.note_write(tensor, custom)
                self._origins.remember(tensor, custom)
        for _, tensor in tensors_in(result):
            if self._origins.of(tensor) is None:
                self._origins.remember(tensor, custom)
        return result

    def _record(self, seen: Seen) -> list[Origin]:
        """Add a call, unless it makes a constant; returns where each of its outputs comes from, which is noted unless it was there before."""
        if not seen.dynamic:
            return self._record_constant(seen)
        frame = seen.frame
        if any(DRAWN in origin for _, _, origin in seen.constants):
            self.drawn[frame.node.path] = None
        number = len(self.calls)
        self.calls.append(seen.as_call(self._sources, self._modules.get(frame.node.path), frame is self._between))
        if not seen.writes:
            for position, tensor in enumerate(seen.outputs):
                self._origins.remember(tensor, (number, position))
        return [(number, position) for position in range(len(seen.outputs))]

    def _record_constant(self, seen: Seen) -> list[Origin]:
        # Random numbers are noise in training, and values in evaluation. So is what is made of numbers that have left the tensors.
        frame, name = seen.frame, seen.function
        from_nowhere = (name in RANDOM and not frame.training) or (self._values_left and name in MAKES_OF_DATA)
        drawn = name in RANDOM or name in DRAWS_WEIGHTS
        origins: list[Origin] = [
            (DRAWN,)
            if drawn and isinstance(tensor, nn.Parameter)
            else self._sources.add("unseen", tensor, frame.node, attributes={"function": name})
            if from_nowhere
            else names_of([origin for _, _, origin in seen.constants])
            for tensor in seen.outputs
        ]
        for tensor, origin in zip(seen.outputs, origins, strict=True):
            self._origins.remember(tensor, origin)
        return origins


class _Between(HiddenMode):
    """Shows a tracer what the step itself calls."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return self.tracer.between(func, args, kwargs or {})


def _version(tensor: Tensor) -> int | None:
    """How often a tensor has been written to; `None` where nobody counts."""
    return None if tensor.is_inference() else tensor._version
