"""One forward, written down: every layer, what it read and from where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_cco.compat.autograd import applied
from lightning_cco.compat.modules import CONTENTS
from lightning_cco.errors import CCOError
from lightning_cco.graph.call import Call, Read, Slot
from lightning_cco.graph.call_node import CallNode, Frame
from lightning_cco.graph.compiled import HiddenMode
from lightning_cco.graph.containers import tensors_held, tensors_in
from lightning_cco.graph.custom_functions import CustomCall, running_function
from lightning_cco.graph.describe import attributes
from lightning_cco.graph.frames import Frames
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.network import End, OuterCall, find_network, has_parameters, is_metric
from lightning_cco.graph.operands import (
    MASK_NOTE,
    MASKING,
    dtype_name,
    is_attention_mask,
    is_mask_like,
    is_quantizable,
    note_of,
    operands_of,
    weights_of,
)
from lightning_cco.graph.ops import MAKES_OF_DATA, RANDOM, READS_OUT, READS_VALUES, Category, Op, operation
from lightning_cco.graph.origins import Origin, Origins, is_constant
from lightning_cco.graph.python_calls import calling_position
from lightning_cco.graph.spelling import as_function, is_operator, name_of_operator

_Operand = tuple[Slot, Tensor, Origin]


class Tracer:
    """Watches one forward and collects its calls. `calls` is in execution order, inputs included, outputs last.

    Attributes:
        calls: What was seen.
        ran: Paths of the modules that ran.
        with_gradients: Paths of those that ran while gradients were recorded.
        read: Names of the parameters that a call has read.
        left_out: Paths of modules with parameters whose calls serve losses alone.
        called: Paths of the modules that are called from outside of any other for the network.
    """

    def __init__(self, model: nn.Module, root: CallNode) -> None:
        self.model = model
        self.calls: list[Call] = []
        self.ran: set[str] = set()
        self.with_gradients: set[str] = set()
        self.read: set[str] = set()
        self.left_out: list[str] = []
        self.called: tuple[str, ...] = ()
        self.frames = Frames(model, root, self._handle)
        self.frames.growing = True
        self.frames.entered, self.frames.left = self._entered, self._left
        self._modules = dict(model.named_modules())
        self._origins = Origins()
        self._inputs = 0
        self._values_left = False
        self._read_out: dict[int, set[int]] = {}
        self._function: tuple[FrameType, CustomCall] | None = None
        self._outer: list[OuterCall] = []
        self._between = Frame(CallNode(""), False)
        self._alive: list[Any] = []
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        lazy = [name for name, parameter in self._parameters.items() if is_lazy(parameter)]
        if lazy:
            raise CCOError(
                f"{type(model).__name__}: the parameters {lazy} of lazy modules have no shape yet. Run a forward on one batch before, at the end of "
                "__init__ or in configure_model (their optimizer needs them, too)."
            )
        for name, tensor in [*self._parameters.items(), *model.named_buffers(remove_duplicate=False)]:
            if self._origins.of(tensor) is None:
                self._origins.remember(tensor, (name,) if isinstance(tensor, nn.Parameter) else ())
        for module in self._modules.values():
            for _, tensor in tensors_in({k: v for k, v in vars(module).items() if k not in CONTENTS}):
                if self._origins.of(tensor) is None:
                    self._origins.remember(tensor, ())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook the model, watch the forward inside the block, take the hooks off."""
        self.frames.attach()
        try:
            with _Between(self):
                yield
            self._finish()
        finally:
            self._function = None
            self._alive.clear()
            self.frames.detach()

    def _entered(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ran.add(frame.node.path)
        if torch.is_grad_enabled():
            self.with_gradients.add(frame.node.path)
        if len(self.frames.stack()) > 1:
            return
        self._outer.append(OuterCall(frame.node.path, self._modules[frame.node.path], len(self.calls)))
        if not self._outer[-1].learned:
            return
        with torch.DisableTorchFunction():  # what this looks at is no part of the model
            for way, tensor in tensors_held([args, kwargs]):
                if self._origins.of(tensor) is None:
                    self._remember_input(tensor, ".".join(str(part) for part in way[1:]))

    def _remember_input(self, tensor: Tensor, argument: str = "") -> Origin:
        attribute = {"argument": argument} if argument else {}
        origin = self._add_source("input", tensor, self.frames.root, attributes=attribute, index=self._inputs)
        self._origins.remember(tensor, origin)
        self._inputs += 1
        return origin

    def _left(self, frame: Frame, output: Any) -> None:
        seen = frame.node.seen[frame.training]
        for kind, count in frame.counts.items():
            seen[kind] = max(count, seen.get(kind, 0))
        if len(self.frames.stack()) == 1:
            outer = self._outer[-1]
            with torch.DisableTorchFunction():
                for way, tensor in tensors_held(output):
                    if outer.learned or self._origins.of(tensor) is not None:
                        end = End(".".join(map(str, way)), tuple(tensor.shape), dtype_name(tensor), is_quantizable(tensor))
                        outer.returned.append((end, self._find(tensor, frame)))
            outer.end = len(self.calls)
            self._alive.append(output)  # an origin is known as long as its tensor lives

    def _finish(self) -> None:
        """Keep what is the network, and add its outputs."""
        for number, outputs in self._read_out.items():
            self.calls[number].layer = replace(self.calls[number].layer, read_out=tuple(sorted(outputs)))
        network = find_network(self._outer, self.calls)
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

    # Where a tensor comes from: a pair of call and output number, or the names of the parameters that a constant is made of.

    def _find(self, tensor: Tensor, frame: Frame) -> Origin:
        """The origin of a tensor as it is now. Values that no call was seen to make, or in more than one, are a source of their own."""
        origin = self._origins.of(tensor)
        if origin is None:
            origin = self._find_unknown(tensor, frame)
        writes = self._origins.writes_since(tensor)
        if not writes and not isinstance(origin, CustomCall):
            return origin
        origins = [self._resolved(o, tensor) for o in [origin, *writes]]
        origin = origins[0]
        if writes and all(is_constant(o) for o in origins):
            origin = _names(origins)
        elif writes:
            origin = self._add_source("written", tensor, frame.node, origins)
        self._origins.remember(tensor, origin)
        return origin

    def _find_unknown(self, tensor: Tensor, frame: Frame) -> Origin:
        """A tensor that no call was seen to make is a value, unless it is a parameter, or shares the memory of what is known."""
        origin: Origin = self._name_of_parameter(tensor, frame)
        if origin is None:
            other = self._origins.sharing_memory(tensor)
            origin = self._find(other, frame) if other is not None else None
            if origin is None and frame is self._between:
                return self._remember_input(tensor)
            if origin is None or not is_constant(origin):
                origin = self._add_source("unseen", tensor, frame.node, [] if origin is None else [origin])
        self._origins.remember(tensor, origin)
        return origin

    def _name_of_parameter(self, tensor: Tensor, frame: Frame) -> tuple[str, ...] | None:
        """The name of a parameter that came into the model after the hooks: sharded ones are put together just for their module's forward."""
        if isinstance(tensor, nn.Parameter):
            return next(((name,) for name, parameter in self.model.named_parameters() if parameter is tensor), ())
        path = frame.node.path
        for name, value in vars(self._modules[path]).items() if path in self._modules else ():
            full = f"{path}.{name}" if path else name
            if value is tensor and full in self._parameters:
                return (full,)
        return None

    def _resolved(self, origin: Origin, tensor: Tensor) -> Origin:
        """Of what a custom function made: one of the outputs of its layer."""
        if not isinstance(origin, CustomCall):
            return origin
        if all(is_constant(o) for o in origin.operands):
            return _names(origin.operands)
        if origin.number is None:
            made = self._add_source("custom_function", tensor, origin.node, origin.operands, {"function": origin.name})
            origin.number = made[0]
            note = f"{origin.name} is a custom autograd.Function: what it computes can't be seen"
            self.calls[made[0]].layer = replace(self.calls[made[0]].layer, quantizable_outputs=(tensor.is_floating_point(),), note=note)
            return made
        layer = self.calls[origin.number].layer
        self.calls[origin.number].layer = replace(
            layer,
            output_shapes=(*layer.output_shapes, tuple(tensor.shape)),
            output_dtypes=(*layer.output_dtypes, dtype_name(tensor)),
            quantizable_outputs=(*layer.quantizable_outputs, tensor.is_floating_point()),
        )
        return origin.number, len(layer.output_shapes)

    def _add_source(
        self,
        kind: str,
        tensor: Tensor,
        node: CallNode,
        origins: list[Origin] | None = None,
        attributes: Mapping[str, object] | None = None,
        index: int = 0,
    ) -> tuple[int, int]:
        """Add a layer that no function mode sees at run time: what reads it quantizes it."""
        ok = is_quantizable(tensor)
        note = (
            ""
            if ok
            else "integer"
            if not (tensor.is_floating_point() or tensor.is_complex())
            else MASK_NOTE
            if tensor.is_floating_point()
            else ""
        )
        sources = [(o[0], o[1]) for o in origins or [] if not is_constant(o)]
        shapes = tuple(self.calls[number].layer.output_shapes[output] for number, output in sources)
        layer = Layer("", node.path, kind, shapes, (tuple(tensor.shape),), (dtype_name(tensor),), (ok,), attributes or {}, note=note)
        call = Call(replace(layer, parameters=_names(origins or [])), node, "", Op(kind, Category.COMPUTE), index, visible=False)
        call.reads = [Read((k,), number, output, self._source_quantizable((number, output))) for k, (number, output) in enumerate(sources)]
        self.calls.append(call)
        return len(self.calls) - 1, 0

    def _source_quantizable(self, origin: tuple[int, int]) -> bool:
        return self.calls[origin[0]].layer.quantizable_outputs[origin[1]]

    # The calls

    def _operands(self, frame: Frame, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Operand]:
        if name.endswith("_like") or name.startswith("new_"):
            return []  # they read shapes and types
        found = operands_of(args, kwargs)
        if name == "__setitem__" and isinstance(args[2], Tensor) and self._origins.of(args[0]) is not None:
            # ``y[:, 1:3] += 1`` assigns what has just been written there.
            value = self._find(args[2], frame)
            if self._origins.writes_since(args[0]) == [value]:
                return [(slot, t, self._resolved(self._origins.of(t), t) if t is args[0] else self._find(t, frame)) for slot, t in found]
        return [(slot, t, self._find(t, frame)) for slot, t in found]

    def _handle(self, frame: Frame, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
        if any(isinstance(tensor, DTensor) for _, tensor, _ in operands):
            raise CCOError(
                f"module '{frame.node.path}': its '{op.kind}' reads a DTensor, cut over processes; whole tensors were expected. Shard the parameters with "
                "fully_shard, which puts them together for each layer, or train with strategy='ddp'."
            )
        if any(tensor.is_nested for _, tensor, _ in operands):
            raise CCOError(
                f"module '{frame.node.path}': its '{op.kind}' reads a nested tensor, which has no INT8 form; a padded one was expected. Give the example, and "
                "train, with torch.nested.to_padded_tensor(x, 0.0) and a mask."
            )
        self.read.update(parameter for _, _, origin in operands if is_constant(origin) for parameter in origin)
        mask_like = any(is_constant(origin) and not is_attention_mask(op, slot) and is_mask_like(t) for slot, t, origin in operands)
        versions = [_version(tensor) for _, tensor in operands_of(args, kwargs)]
        result = func(*args, **kwargs)
        if name in READS_OUT and any(not is_constant(o) and t.is_floating_point() for _, t, o in operands):
            self._values_left = True
        if frame is not self._between and (
            name in READS_VALUES or (op.category is Category.ALIAS and isinstance(result, Tensor) and not result.is_floating_point())
        ):
            self._note_read_out(operands)
        if name == "__set__" and getattr(getattr(func, "__self__", None), "__name__", "") == "data":
            self._count(frame, op)
            self._origins.remember(args[0], operands[1][2])
            return result
        if op.category is Category.ALIAS:
            target = next((t for _, t, _ in operands), None)
            if isinstance(result, Tensor) and target is not None and result.is_floating_point() and not target.is_floating_point():
                # Floats made of integers or complex numbers: consumers quantize them, as they do inputs.
                cast = Op("cast", Category.COMPUTE)
                self._record(frame, name, cast, frame.counts.get("cast", 0), args, kwargs, [result], operands, mask_like, visible=False)
            elif isinstance(result, Tensor) and target is not None and self._origins.of(result) is None:
                self._origins.remember(result, operands[0][2])
            return result
        index = self._count(frame, op)
        outputs = [args[0]] if name == "__setitem__" else [tensor for _, tensor in tensors_in(result)]
        written = [
            t for (_, t), before in zip(operands_of(args, kwargs), versions, strict=True) if before is not None and _version(t) != before
        ]
        given = [tensor for _, tensor in tensors_in(kwargs.get("out"))]
        in_place = bool(args and outputs) and outputs[0] is args[0]
        if given:
            written = given
        elif in_place:
            written = [t for t in written if t is args[0]]
        elif op.kind in ("batch_norm", "instance_norm"):
            written = []  # statistics of training
        outputs = outputs or written
        if outputs:
            origins = self._record(
                frame, name, op, index, args, kwargs, outputs, operands, mask_like, writes=bool(written) and not in_place
            )
            for tensor in written:
                if self._origins.of(tensor) is None or in_place:
                    self._origins.note_write(tensor, origins[0])
                    self._origins.remember(tensor, origins[0])
                else:
                    self._origins.note_write(tensor, origins[0])
        return result

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

    def _is_of_network(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call may belong to the network: in a module with parameters, or on what comes from one or from a parameter."""
        if frame is not self._between and self._outer and self._outer[-1].learned:
            return True
        if frame is not self._between and self._outer and is_metric(self._outer[-1].module):
            return False
        origins = (self._origins.of(tensor) for _, tensor in operands_of(args, kwargs))
        return any(origin is not None and (not is_constant(origin) or origin != ()) for origin in origins)

    def _note_read_out(self, operands: list[_Operand]) -> None:
        """Note floats whose very values are read: rounding them would give others."""
        for _, tensor, origin in operands:
            if tensor.is_floating_point() and not is_constant(origin):
                self._read_out.setdefault(origin[0], set()).add(origin[1])

    def _count(self, frame: Frame, op: Op) -> int:
        index = frame.counts.get(op.kind, 0)
        frame.counts[op.kind] = index + 1
        return index

    def _inside(
        self, function: FrameType, frame: Frame, op: Op, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call within a custom function. The mode sees it at run time too, so it is counted here, but it is no layer."""
        if self._function is None or self._function[0] is not function:
            kind, its_args, its_kwargs = applied(function)
            given = operands_of(its_args, its_kwargs)
            custom = CustomCall(kind.__name__, frame.node, [self._find(tensor, frame) for _, tensor in given])
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

    def _record(
        self,
        frame: Frame,
        name: str,
        op: Op,
        index: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: list[Tensor],
        operands: list[_Operand],
        mask_like: bool,
        visible: bool = True,
        writes: bool = False,
    ) -> list[Origin]:
        """Add a call, unless it makes a constant; returns where each of its outputs comes from, which is noted unless it was there before."""
        dynamic = [(slot, t, o) for slot, t, o in operands if not is_constant(o)]
        constants = [(slot, t, o) for slot, t, o in operands if is_constant(o)]
        if not dynamic:
            # Random numbers are noise in training, and values in evaluation. So is what is made of numbers that have left the tensors.
            from_nowhere = (name in RANDOM and not frame.training) or (self._values_left and name in MAKES_OF_DATA)
            origins: list[Origin] = [
                self._add_source("unseen", t, frame.node, attributes={"function": name})
                if from_nowhere
                else _names([o for _, _, o in constants])
                for t in outputs
            ]
            for tensor, origin in zip(outputs, origins, strict=True):
                self._origins.remember(tensor, origin)
            return origins

        outside = frame is self._between
        call = Call(
            Layer("", frame.node.path, op.kind, outside=outside),
            frame.node,
            name,
            op,
            index,
            frame.training,
            visible=visible and not outside,
        )
        call.in_place = bool(args) and outputs[0] is args[0]
        call.reads = [
            Read(slot, origin[0], origin[1], is_quantizable(t) and self._source_quantizable(origin)) for slot, t, origin in dynamic
        ]
        call.weights = weights_of(op, constants, args)
        masking = (
            op.kind in MASKING
            or mask_like
            or any(not r.quantizable and t.is_floating_point() for r, (_, t, _) in zip(call.reads, dynamic, strict=True))
        )
        quantizable = tuple(t.is_floating_point() and not (masking and is_mask_like(t)) for t in outputs)
        if _is_own_code(self._modules.get(frame.node.path)):
            call.position = calling_position()
        weight = next((t for slot, t, _ in constants if call.weights and slot == call.weights[0].slot), None)
        parameters = _names([o for _, _, o in constants])
        if call.weights:
            first = call.weights[0].parameters
            parameters = (*first, *(p for p in parameters if p not in first))
        call.layer = replace(
            call.layer,
            input_shapes=tuple(tuple(t.shape) for _, t, _ in dynamic),
            output_shapes=tuple(tuple(t.shape) for t in outputs),
            output_dtypes=tuple(dtype_name(t) for t in outputs),
            quantizable_outputs=quantizable,
            attributes={**attributes(op.kind, self._modules.get(frame.node.path), args, kwargs, weight), **_steps(kwargs)},
            parameters=parameters,
            weighted=op.category is Category.WEIGHTED or (op.category is Category.MATMUL and any(w.parameters for w in call.weights)),
            note=note_of(quantizable, mask_like, [t for _, t, _ in dynamic], outputs)
            or ("writes its result into tensors that it is given" if writes else ""),
        )
        if call.weights and op.category in (
            Category.MATMUL,
            Category.COMPUTE,
        ):  # which operand is constant decides what engines have a form for
            where = {"weight_first": True} if call.layer.weighted and _before(call.weights[0].slot, call.reads[0].slot) else {}
            shapes = [tuple(t.shape) for slot, t, _ in constants if slot == call.weights[0].slot]
            call.layer = replace(call.layer, attributes={**call.layer.attributes, "operand_shape": shapes[0], **where})
        number = len(self.calls)
        self.calls.append(call)
        if not writes:
            for position, tensor in enumerate(outputs):
                self._origins.remember(tensor, (number, position))
        return [(number, position) for position in range(len(outputs))]


class _Between(HiddenMode):
    """Shows a tracer what the step itself calls."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return self.tracer.between(func, args, kwargs or {})


def _names(origins: list[Origin]) -> tuple[str, ...]:
    """The parameters that constants are made of, each once."""
    return tuple(dict.fromkeys(name for origin in origins if is_constant(origin) for name in origin))


def _before(slot: Slot, other: Slot) -> bool:
    return all(isinstance(part, int) for part in (*slot, *other)) and [int(part) for part in slot] < [int(part) for part in other]


def _version(tensor: Tensor) -> int | None:
    """How often a tensor has been written to; `None` where nobody counts."""
    return None if tensor.is_inference() else tensor._version


def _is_own_code(module: nn.Module | None) -> bool:
    return module is not None and not type(module).__module__.startswith("torch.")


def _steps(kwargs: Mapping[str, Any]) -> dict[str, object]:
    """The mode of a division that rounds its result."""
    mode = kwargs.get("rounding_mode")
    return {} if mode is None else {"rounding_mode": mode}
