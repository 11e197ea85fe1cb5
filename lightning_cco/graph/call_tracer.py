"""The torch calls of a forward: what each reads and makes, and which of them are layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_cco.compat.dynamo import TAKE_FUNCTIONS
from lightning_cco.graph.call import Call
from lightning_cco.graph.call_node import CallNode, ModuleCall
from lightning_cco.graph.carried_state import Carried, drawn_apart
from lightning_cco.graph.containers import tensors_in
from lightning_cco.graph.custom_functions import CustomCall, RunningFunction, RunningFunctions
from lightning_cco.graph.higher_order import IN_FLOAT, WatchedBodies
from lightning_cco.graph.loops import Loops
from lightning_cco.graph.network import OuterCall, is_metric
from lightning_cco.graph.operands import is_attention_mask, is_mask_like, operands_of
from lightning_cco.graph.operator_calls import is_custom
from lightning_cco.graph.ops import DRAWS_WEIGHTS, MAKES_OF_DATA, OVERWRITES, RANDOM, READS_OUT, READS_VALUES, Category, Op, operation
from lightning_cco.graph.origins import DRAWN, Origin, is_constant
from lightning_cco.graph.outside_readers import ValueReaders
from lightning_cco.graph.records import Operand, Seen, refuse_tensors
from lightning_cco.graph.sources import Sources, names_of


class CallTracer:
    """Makes the torch calls of a forward and notes them.

    Args:
        model: The model.
        root: The tree of module calls.
        carried: What earlier forwards have left in the model.
        outer: The module calls from outside of any other, the running one last.

    Attributes:
        calls: What was seen, in execution order.
        read: Names of the parameters that a call has read.
        custom: Kinds of the layers that custom operators are.
        drawn: Paths of the modules that compute with parameters which the forward itself has drawn at random.
        between: The frame of what the step calls outside of any module.
        sources: Where tensors come from.
        readers: Who reads values that no layer reads.
        alive: Tensors whose origins are to be known later.
    """

    def __init__(self, model: nn.Module, root: CallNode, carried: Carried, outer: list[OuterCall]) -> None:
        self.calls: list[Call] = []
        self.read: set[str] = set()
        self.custom: set[str] = set()
        self.loops = Loops()
        self.drawn: dict[str, None] = {}
        self.between = ModuleCall(CallNode(""), False)
        self.sources = Sources(model, root, self.calls, self.between, carried)
        self.readers = ValueReaders(model, self.sources.origins, self.calls)
        self.alive: list[Any] = []
        self._origins = self.sources.origins
        self._modules = dict(model.named_modules())
        self._outer = outer
        self._values_left = False
        self._drawn_apart: dict[int, tuple[str, ...]] = {}
        self._running = RunningFunctions()
        self._function: tuple[Any, CustomCall] | None = None

    def end(self) -> None:
        """Let go of what only a running forward needs."""
        self._function = None
        self.alive.clear()

    def note_drawn(self) -> None:
        """Note which calls make only random numbers, once all are seen."""
        self._drawn_apart = drawn_apart(self.calls)

    def made_of(self, tensor: Tensor) -> tuple[str, ...] | None:
        """Names of the parameters that a tensor is made of in this forward; `None` if it depends on the model's inputs, or nobody knows.

        Random numbers that the forward has drawn depend on none.
        """
        found: list[str] = []
        if self.sources.has_changed(tensor):
            return None
        for origin in self._origins.all_of(tensor):
            names = origin if is_constant(origin) else self._drawn_apart.get(origin[0]) if isinstance(origin, tuple) else None
            if names is None:
                return None
            found += names
        return tuple(dict.fromkeys(found))

    def handle(self, frame: ModuleCall, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call, and note it if it may belong to the network."""
        if not args and getattr(func, "__module__", "") == "torch.nn.init" and "tensor" in kwargs:
            args, kwargs = (kwargs["tensor"],), {key: value for key, value in kwargs.items() if key != "tensor"}
        op = operation(name)
        if is_custom(func):
            self.custom.add(op.kind)
        running = self._running.outermost()
        if running is not None:
            return self._inside(running, frame, op, func, args, kwargs)
        self._function = None
        if name in TAKE_FUNCTIONS:
            return self._with_bodies(Seen(frame, name, op, self._count(frame, op), args, kwargs, [], [], False, visible=False), func)
        if not self._is_of_network(frame, args, kwargs):
            self._count(frame, op)
            return func(*args, **kwargs)
        # In-place calls overwrite what they read: look at the operands first.
        operands = self._operands(frame, name, args, kwargs)
        refuse_tensors(frame.node.path, op.kind, [tensor for _, tensor, _ in operands])
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

    def _with_bodies(self, seen: Seen, func: Callable[..., Any]) -> Any:
        """A call of an operator that takes functions, whose weights are read out of sight."""
        bodies = WatchedBodies()
        operands = self._operands(seen.frame, seen.function, seen.args, seen.kwargs)
        result = bodies.call(func, seen.args, seen.kwargs)
        weights: list[Operand] = [(("functions", k), w, self.sources.find(w, seen.frame)) for k, w in enumerate(bodies.read.values())]
        self.read.update(name for _, _, names in weights for name in names)
        before = len(self.calls)
        self._note_result(replace(seen, operands=operands + weights), result, [])
        for call in self.calls[before:]:
            call.layer = replace(call.layer, note=call.layer.note or IN_FLOAT.format(seen.op.kind))
        return result

    def _operands(self, frame: ModuleCall, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Operand]:
        if name.endswith("_like") or name.startswith("new_"):
            return []  # they read shapes and types
        found = operands_of(args, kwargs)
        if name in OVERWRITES and name.endswith("_") and args and self._is_overwritten(args[0]):
            found = [(slot, tensor) for slot, tensor in found if slot != (0,)]
        if name == "__setitem__" and isinstance(args[2], Tensor) and self._origins.of(args[0]) is not None:
            # ``y[:, 1:3] += 1`` assigns what has just been written there.
            value = self.sources.find(args[2], frame)
            if self._origins.writes_since(args[0]) == [value]:
                return [
                    (slot, t, self.sources.resolved(self._origins.of(t), t) if t is args[0] else self.sources.find(t, frame))
                    for slot, t in found
                ]
        return [(slot, t, self.sources.find(t, frame)) for slot, t in found]

    def _is_overwritten(self, tensor: Any) -> bool:
        """Whether what a tensor held before a call that writes all of it comes from no layer, so that nobody need know."""
        origins = self._origins.all_of(tensor)
        return all(origin is None or is_constant(origin) or self._is_unseen(origin) for origin in origins)

    def _is_unseen(self, origin: Origin) -> bool:
        return not isinstance(origin, CustomCall) and self.calls[origin[0]].layer.kind in ("unseen", "written")

    def _note_values_read(self, seen: Seen, result: Any) -> None:
        """Note values that leave the tensors, and floats whose very values are read."""
        if seen.function in READS_OUT and any(not is_constant(o) and t.is_floating_point() for _, t, o in seen.operands):
            self._values_left = True
        makes_no_floats = seen.op.category is Category.ALIAS and isinstance(result, Tensor) and not result.is_floating_point()
        if seen.frame is not self.between and (seen.function in READS_VALUES or makes_no_floats):
            self.readers.note_read_out(seen.operands)

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
            self.sources.remember(result, origin)
            self._note_cut(replace(seen, outputs=[result]))
            if seen.function in ("clone", "__deepcopy__") and is_constant(origin) and origin:
                self.alive.append(result)  # `nn.Parameter(copy)` and `copy.deepcopy` make another tensor in its memory

    def _note_result(self, seen: Seen, result: Any, written: list[Tensor]) -> None:
        """Add a call by what it gives: its result, or what it has written to.

        Args:
            seen: The call, without outputs yet.
            result: What it returned.
            written: The operands whose memory has changed.
        """
        outputs = [seen.args[0]] if seen.function == "__setitem__" else [tensor for _, tensor in tensors_in(result)]
        given = [tensor for _, tensor in tensors_in(seen.kwargs.get("out"))]
        in_place = self._overwrites(seen, result, outputs, written)
        if given:
            written = given
        elif in_place:
            written = [t for t in written if t is seen.args[0]]
        elif seen.op.kind in ("batch_norm", "instance_norm"):
            # Statistics of training, which are written to without PyTorch's counting it.
            self.sources.contents.note(*(tensor for _, tensor in operands_of(seen.args, seen.kwargs)))
            written = []
        outputs = outputs or written
        if not outputs:
            return
        origins = self._record(replace(seen, outputs=outputs, writes=bool(written) and not in_place, in_place=in_place))
        for tensor in written:
            known = self._origins.of(tensor) is not None
            self._origins.note_write(tensor, origins[0], whole=in_place and seen.function in OVERWRITES)
            if not known or in_place:
                self._origins.remember(tensor, origins[0])

    def _overwrites(self, seen: Seen, result: Any, outputs: list[Tensor], written: list[Tensor]) -> bool:
        """Whether a call overwrites its first argument. One that may give the argument itself (``broadcast_tensors``) does not."""
        if isinstance(result, (tuple, list)) or not (seen.args and outputs and outputs[0] is seen.args[0]):
            return False
        return _version(seen.args[0]) is None or any(tensor is seen.args[0] for tensor in written)

    def _is_of_network(self, frame: ModuleCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call may belong to the network: in a module with parameters, or on what comes from one or from a parameter."""
        if frame is not self.between and self._outer and self._outer[-1].learned:
            return True
        if frame is not self.between and self._outer and is_metric(self._outer[-1].module):
            return False
        origins = (self._origins.of(tensor) for _, tensor in operands_of(args, kwargs))
        return any(origin is not None and (not is_constant(origin) or origin != ()) for origin in origins)

    def _count(self, frame: ModuleCall, op: Op) -> int:
        return self.loops.count(frame, op.kind)

    def _inside(
        self, running: RunningFunction, frame: ModuleCall, op: Op, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call within a custom function. The mode sees it at run time too, so it is counted here, but it is no layer."""
        if self._function is None or self._function[0] is not running.frame:
            given = operands_of(running.given, {})
            custom = CustomCall(running.name, frame.node, [self.sources.find(tensor, frame) for _, tensor in given])
            self._function = running.frame, custom
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
        frame = seen.frame
        refuse_tensors(frame.node.path, seen.op.kind, seen.outputs, makes=True)
        if not seen.dynamic:
            return self._record_constant(seen)
        if any(DRAWN in origin for _, _, origin in seen.constants):
            self.drawn[frame.node.path] = None
        number = len(self.calls)
        self.calls.append(seen.as_call(self.sources, self._modules.get(frame.node.path), frame is self.between))
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
            else self.sources.add("unseen", tensor, frame.node, attributes={"function": name})
            if from_nowhere
            else names_of([origin for _, _, origin in seen.constants])
            for tensor in seen.outputs
        ]
        for tensor, origin in zip(seen.outputs, origins, strict=True):
            self.sources.remember(tensor, origin)
        self._note_cut(seen)
        return origins

    def _note_cut(self, seen: Seen) -> None:
        self.sources.cuts.note(seen.op, seen.args, seen.kwargs, [tensor for _, tensor, _ in seen.operands], seen.outputs)


def _version(tensor: Tensor) -> int | None:
    """How often a tensor has been written to; `None` where nobody counts."""
    return None if tensor.is_inference() else tensor._version
