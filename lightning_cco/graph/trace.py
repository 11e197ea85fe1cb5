"""One forward, written down: every layer, what it read and from where."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointFunction

from lightning_cco.errors import CCOError
from lightning_cco.graph.describe import attributes
from lightning_cco.graph.frames import CallNode, Frame, Frames, calling_position, tensors_in
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.ops import Category, Op, operation

Slot = tuple[Any, ...]
"""Way to a tensor in a call: position or keyword first, then indices into nested lists."""


@dataclass(frozen=True)
class Read:
    """A tensor that a call takes from another layer."""

    slot: Slot
    source: int
    output: int
    quantizable: bool


@dataclass(frozen=True)
class Weight:
    """A parameter, or a tensor computed from parameters alone, that a call multiplies by or adds.

    Attributes:
        slot: Where it stands in the call.
        parameters: Dotted names of the parameters it comes from; empty for a constant.
        axis: Axis that counts output channels; `None`: one scale for the whole tensor.
    """

    slot: Slot
    parameters: tuple[str, ...]
    axis: int | None


@dataclass
class Call:
    """One torch call, as the tracer saw it.

    Attributes:
        layer: The layer, its name still empty.
        node: The frame it ran in.
        function: Name of the torch function, spelled as called.
        op: Its row in the table of operations.
        index: Which call of this operation within the frame.
        training: Whether the module that made the call was in training mode.
        in_place: Whether the result is the first argument itself.
        visible: Whether a function mode sees it again at run time (inputs, outputs and custom functions are not seen).
        position: Where in the user's code the call stands, for telling two branches apart; -1 in modules of PyTorch itself.
    """

    layer: Layer
    node: CallNode
    function: str
    op: Op
    index: int
    training: bool = False
    reads: list[Read] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    in_place: bool = False
    visible: bool = True
    position: int = -1


def _is_mask_like(tensor: Tensor) -> bool:
    """Whether it holds the huge values that attention masks are made of: an INT8 scale over them would leave nothing of the rest."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return False
    low, high = torch.aminmax(tensor.detach())
    limit = 0.1 * torch.finfo(tensor.dtype).max
    return bool((low < -limit) | (high > limit))


_MASK_NOTE = "holds the huge values of a mask: an INT8 scale over them would leave nothing of the rest"
_MASKING = {"masked_fill", "where", "triu", "tril", "setitem", "masked_scatter", "full"}


class Tracer:
    """Watches one forward and collects its calls. `calls` is in execution order, inputs included, outputs last."""

    def __init__(self, model: nn.Module, root: CallNode) -> None:
        self.model = model
        self.calls: list[Call] = []
        self.frames = Frames(model, root, self._handle)
        self.frames.growing = True
        self.frames.entered, self.frames.left = self._entered, self._left
        self._modules = dict(model.named_modules())
        self._known: dict[int, tuple[weakref.ref[Tensor], Any]] = {}
        self._inputs = 0
        self._inside_custom_function = 0
        self._returned: list[tuple[str, Tensor]] = []
        self._last_returned: set[Any] = set()
        for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
            if id(tensor) not in self._known:
                self._remember(tensor, (name,) if isinstance(tensor, nn.Parameter) else ())
        for module in self._modules.values():
            for _, tensor in tensors_in({k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}):
                if id(tensor) not in self._known:
                    self._remember(tensor, ())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook the model, watch the forward inside the block, take the hooks off."""
        original = vars(torch.autograd.Function)["apply"]  # the classmethod itself, not one bound to the base class
        tracer = self

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if cls is CheckpointFunction:  # reentrant checkpointing: its forward is the user's own, layer by layer
                return original.__func__(cls, *args, **kwargs)
            # What runs inside is seen by the mode at run time too, so it is counted here, but it is no layer.
            tracer._inside_custom_function += 1
            try:
                result = original.__func__(cls, *args, **kwargs)
            finally:
                tracer._inside_custom_function -= 1
            with torch._C.DisableTorchFunction():
                tracer._custom_function(cls.__name__, args, kwargs, result)
            return result

        torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
        self.frames.attach()
        try:
            yield
            self._finish()
        finally:
            torch.autograd.Function.apply = original  # type: ignore[method-assign]
            self.frames.detach()

    # A tensor's origin is a (call number, output number) pair; parameters and constants carry the names of the parameters they come from.
    def _remember(self, tensor: Tensor, origin: Any) -> None:
        self._known[id(tensor)] = (weakref.ref(tensor), origin)

    def _origin(self, tensor: Tensor) -> Any:
        entry = self._known.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def _entered(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(self.frames.stack()) > 1:
            return
        with torch._C.DisableTorchFunction():  # what this looks at is no part of the model
            for slot, tensor in tensors_in([args, kwargs]):
                if self._origin(tensor) is None:
                    self._add_input(tensor, ".".join(str(part) for part in slot[1:]))

    def _left(self, frame: Frame, output: Any) -> None:
        seen = frame.node.seen[frame.training]
        for kind, count in frame.counts.items():
            seen[kind] = max(count, seen.get(kind, 0))
        if len(self.frames.stack()) == 1:
            returned = [(".".join(map(str, slot)), tensor) for slot, tensor in tensors_in(output)]
            self._returned += returned
            self._last_returned = {self._origin(tensor) for _, tensor in returned}

    def _add_input(self, tensor: Tensor, argument: str) -> None:
        note = "" if _quantizable(tensor) else "integer" if not tensor.is_floating_point() else _MASK_NOTE
        shape = tuple(tensor.shape)
        layer = Layer("", "", "input", (), (shape,), (_dtype(tensor),), (not note,), {"argument": argument}, note=note)
        call = Call(layer, self.frames.root, "", Op("input", Category.COMPUTE), self._inputs, visible=False)
        self._inputs += 1
        self._remember(tensor, (len(self.calls), 0))
        self.calls.append(call)

    def _finish(self) -> None:
        """Add the outputs: what the last top-level call returned, and what earlier ones returned and nothing read afterwards."""
        read = {(r.source, r.output) for call in self.calls for r in call.reads}
        ends: dict[tuple[int, int], tuple[str, Tensor]] = {}
        for key, tensor in self._returned:
            origin = self._origin(tensor)
            if isinstance(origin, tuple) and origin and isinstance(origin[0], int):
                ends.setdefault(origin, (key, tensor))
        for origin, (key, tensor) in ends.items():
            if origin in read and origin not in self._last_returned:
                continue
            shape = tuple(tensor.shape)
            layer = Layer("", "", "output", (shape,), (shape,), (_dtype(tensor),), (), {"key": key} if key else {})
            call = Call(layer, self.frames.root, "", Op("output", Category.COMPUTE), 0, visible=False)
            call.reads = [Read((0,), origin[0], origin[1], _quantizable(tensor))]
            self.calls.append(call)

    def _custom_function(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not self.frames.stack() or self._inside_custom_function:
            return
        op = Op("custom_function", Category.COMPUTE)
        self._record(self.frames.stack()[-1], name, op, args, kwargs, result, visible=False)
        if self.calls and self.calls[-1].op is op:
            layer = self.calls[-1].layer
            note = f"{name} is a custom autograd.Function: what it computes can't be seen"
            self.calls[-1].layer = replace(layer, attributes={"function": name}, note=note)

    def _handle(self, frame: Frame, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op = operation(name)
        if self._inside_custom_function:
            if op.category is not Category.ALIAS:
                frame.counts[op.kind] = frame.counts.get(op.kind, 0) + 1
            return func(*args, **kwargs)
        target = args[0] if args and isinstance(args[0], Tensor) else None
        target_origin = self._origin(target) if target is not None else None
        # In-place calls overwrite what they read: look at the operands first.
        operands = [(slot, tensor, self._origin(tensor)) for slot, tensor in _operands(args, kwargs)]
        if any(isinstance(tensor, DTensor) for _, tensor, _ in operands):
            raise CCOError(
                f"module '{frame.node.path}': its '{op.kind}' reads a DTensor, cut over processes; whole tensors were expected. Shard the parameters with "
                "fully_shard, which puts them together for each layer, or train with strategy='ddp'."
            )
        mask_like = {
            id(t) for slot, t, origin in operands if _is_constant(origin) and not _is_attention_mask(op, slot) and _is_mask_like(t)
        }
        result = func(*args, **kwargs)
        if op.category is Category.ALIAS:
            if isinstance(result, Tensor) and target is not None and result.is_floating_point() and not target.is_floating_point():
                # Floats made of integers or complex numbers: consumers quantize them, as they do inputs.
                self._record(frame, name, Op("cast", Category.COMPUTE), args, kwargs, result, operands=operands, visible=False)
            elif isinstance(result, Tensor) and target is not None and self._origin(result) is None:
                self._remember(result, () if target_origin is None else target_origin)
            return result
        self._record(frame, name, op, args, kwargs, result, operands=operands, mask_like=mask_like)
        return result

    def _record(
        self,
        frame: Frame,
        name: str,
        op: Op,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        operands: list[tuple[Slot, Tensor, Any]] | None = None,
        mask_like: set[int] = frozenset(),  # type: ignore[assignment]
        visible: bool = True,
    ) -> None:
        if operands is None:
            operands = [(slot, tensor, self._origin(tensor)) for slot, tensor in _operands(args, kwargs)]
        outputs = [args[0]] if name == "__setitem__" else [tensor for _, tensor in tensors_in(result)]
        index = frame.counts.get(op.kind, 0)
        if visible:
            frame.counts[op.kind] = index + 1
        if not outputs:
            return
        if name.endswith("_like") or name.startswith("new_"):
            operands = []
        dynamic = [(slot, t, o) for slot, t, o in operands if o is not None and not _is_constant(o)]
        for _, tensor, origin in operands:
            if origin is None:  # made where no mode could see it: a constant for all we know
                self._remember(tensor, self._parameter_name(tensor))
        operands = [(slot, t, o if o is not None else self._origin(t)) for slot, t, o in operands]
        constants = [(slot, t, o) for slot, t, o in operands if _is_constant(o)]
        if not dynamic:
            names = tuple(dict.fromkeys(n for _, _, o in constants for n in o))
            for tensor in outputs:
                self._remember(tensor, names)
            return

        call = Call(Layer("", frame.node.path, op.kind), frame.node, name, op, index, frame.training, visible=visible)
        call.in_place = bool(args) and outputs[0] is args[0]
        call.reads = [Read(slot, origin[0], origin[1], _quantizable(t) and self._source_quantizable(origin)) for slot, t, origin in dynamic]
        call.weights = _weights(op, constants, args)
        masking = (
            op.kind in _MASKING
            or bool(mask_like)
            or any(not r.quantizable and t.is_floating_point() for r, (_, t, _) in zip(call.reads, dynamic, strict=True))
        )
        quantizable = tuple(t.is_floating_point() and not (masking and _is_mask_like(t)) for t in outputs)
        if _is_own_code(self._modules.get(frame.node.path)):
            call.position = calling_position()
        weight = next((t for slot, t, _ in constants if call.weights and slot == call.weights[0].slot), None)
        parameters = tuple(dict.fromkeys(n for _, _, o in constants for n in o))
        if call.weights:
            first = call.weights[0].parameters
            parameters = (*first, *(p for p in parameters if p not in first))
        call.layer = replace(
            call.layer,
            input_shapes=tuple(tuple(t.shape) for _, t, _ in dynamic),
            output_shapes=tuple(tuple(t.shape) for t in outputs),
            output_dtypes=tuple(_dtype(t) for t in outputs),
            quantizable_outputs=quantizable,
            attributes=attributes(op.kind, self._modules.get(frame.node.path), args, kwargs, weight),
            parameters=parameters,
            weighted=op.category is Category.WEIGHTED or (op.category is Category.MATMUL and any(w.parameters for w in call.weights)),
            note=_note(quantizable, bool(mask_like), [t for _, t, _ in dynamic], outputs),
        )
        number = len(self.calls)
        self.calls.append(call)
        for position, tensor in enumerate(outputs):
            self._remember(tensor, (number, position))

    def _parameter_name(self, tensor: Tensor) -> tuple[str, ...]:
        """The name of a parameter that came into the model after the hooks: fully sharded ones are put together just for their module's forward."""
        if not isinstance(tensor, nn.Parameter):
            return ()
        return next(((name,) for name, parameter in self.model.named_parameters() if parameter is tensor), ())

    def _source_quantizable(self, origin: tuple[int, int]) -> bool:
        return self.calls[origin[0]].layer.quantizable_outputs[origin[1]]


def _operands(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Slot, Tensor]]:
    return tensors_in(tuple(args)) + (tensors_in(dict(kwargs)) if kwargs else [])


def _is_constant(origin: Any) -> bool:
    return isinstance(origin, tuple) and (not origin or isinstance(origin[0], str))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _quantizable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not _is_mask_like(tensor)


def _weights(op: Op, constants: list[tuple[Slot, Tensor, tuple[str, ...]]], args: tuple[Any, ...]) -> list[Weight]:
    """Which constant operands are quantized with the layer, and along which axis."""
    floats = [(slot, t, names) for slot, t, names in constants if t.is_floating_point()]
    if op.category is Category.WEIGHTED and op.weight is not None:
        position, keyword = op.weight
        chosen = [(s, t, n) for s, t, n in floats if s[0] in (position, keyword) and t.dim() > 1]
        if op.kind.endswith("_cell"):
            chosen = [(s, t, n) for s, t, n in floats if t.dim() == 2]
        return [Weight(slot, names, op.channel_axis) for slot, t, names in chosen]
    if op.category is Category.MATMUL:
        found = []
        for slot, t, names in floats:
            if t.dim() < 2 or (op.kind in ("addmm", "baddbmm") and slot[0] in (0, "input")) or _is_attention_mask(op, slot):
                continue  # an added operand is a bias: it is rounded with the accumulator, not with the weight
            left = slot[0] == (1 if op.kind in ("addmm", "baddbmm") else 0)
            axis = None if op.kind == "einsum" or t.dim() > 2 else (t.dim() - 2 if left else t.dim() - 1)
            found.append(Weight(slot, names, axis))
        return found
    if op.kind in ("add", "sub", "mul", "div", "concat", "stack"):
        return [Weight(slot, names, None) for slot, t, names in floats if t.numel() > 1]
    return []


def _is_attention_mask(op: Op, slot: Slot) -> bool:
    return op.kind == "scaled_dot_product_attention" and slot[0] in (3, "attn_mask")


def _is_own_code(module: nn.Module | None) -> bool:
    return module is not None and not type(module).__module__.startswith("torch.")


def _note(quantizable: tuple[bool, ...], mask_like: bool, inputs: list[Tensor], outputs: list[Tensor]) -> str:
    if any(t.is_complex() for t in [*inputs, *outputs]):
        return "complex numbers have no INT8 form"
    if mask_like or any(not ok and t.is_floating_point() for ok, t in zip(quantizable, outputs, strict=True)):
        return _MASK_NOTE
    if not any(t.is_floating_point() for t in outputs):
        return "integer"
    return ""
