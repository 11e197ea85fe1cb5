"""A torch call, written down as a layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.masked import MaskedTensor

from lightning_cco.errors import CCOError
from lightning_cco.graph.call import ArgPath, Call, Read
from lightning_cco.graph.call_node import ModuleCall
from lightning_cco.graph.channel_constants import scales_and_shifts
from lightning_cco.graph.describe import attributes
from lightning_cco.graph.layer import Layer, Shape
from lightning_cco.graph.multiplications import multiplications
from lightning_cco.graph.operands import MASKING, dtype_name, is_mask_like, is_quantizable, note_of, weights_of
from lightning_cco.graph.ops import Category, Op
from lightning_cco.graph.origins import DRAWN, Origin, is_constant
from lightning_cco.graph.python_calls import calling_position
from lightning_cco.graph.sources import Sources, parameters_of

_DRAWN = "the forward draws the weights that it multiplies by at random, each time anew: there is nothing to round or to store"
_LOOKUP = "selects from a constant by indexing; torch.nn.functional.embedding(indices, weight) has an INT8 kernel"
Operand = tuple[ArgPath, Tensor, Origin]
"""A tensor that a call is given: where it stands, and where it comes from."""


def refuse_tensors(path: str, kind: str, tensors: Iterable[Tensor], makes: bool = False) -> None:
    """Refuse tensors that no layer can be written down for.

    Args:
        path: Path of the module that makes the call.
        kind: What the call is.
        tensors: What it reads, or makes.
        makes: Whether it makes them.

    Raises:
        CCOError: One is distributed, nested, or masked.
    """
    for tensor in tensors:
        if not (tensor.is_nested or isinstance(tensor, (DTensor, MaskedTensor))):
            continue
        where = f"module '{path}'" if path else "the model itself"
        what = f"{where}: its '{kind}' {'makes' if makes else 'reads'}"
        if tensor.is_nested:
            raise CCOError(
                f"{what} a nested tensor, which no INT8 kernel takes: expected a padded one. Give the example, and "
                "train, with torch.nested.to_padded_tensor(x, 0.0) and a mask."
            )
        if isinstance(tensor, MaskedTensor):
            raise CCOError(
                f"{what} a MaskedTensor, which no INT8 kernel takes: expected a tensor and its mask. Write torch.where(mask, x, 0.0), or fill what is "
                "masked by to_tensor(0.0) before a layer reads it."
            )
        raise CCOError(
            f"{what} a DTensor, sharded over processes: expected whole tensors. Shard the parameters with "
            "fully_shard, which puts them together for each layer, or train with strategy='ddp'."
        )


@dataclass
class Seen:
    """A torch call that has just run.

    Attributes:
        frame: The module call it ran in.
        function: Name of the torch function.
        op: Its row in the table of operations.
        index: Which call of this operation within the frame.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        outputs: The tensors that it made.
        operands: The tensors that it was given.
        mask_like: Whether a constant among them is a mask.
        visible: Whether a function mode sees it again at run time.
        writes: Whether it writes into tensors that it was given for that.
        in_place: Whether it overwrites its first argument, which is its result.
    """

    frame: ModuleCall
    function: str
    op: Op
    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    operands: list[Operand]
    mask_like: bool
    visible: bool = True
    writes: bool = False
    in_place: bool = False

    @property
    def dynamic(self) -> list[Operand]:
        """The operands that depend on the model's inputs."""
        return [operand for operand in self.operands if not is_constant(operand[2])]

    @property
    def constants(self) -> list[Operand]:
        """The operands that do not."""
        return [operand for operand in self.operands if is_constant(operand[2])]

    def as_call(self, sources: Sources, module: nn.Module | None, outside: bool) -> Call:
        """What is written down of it.

        Args:
            sources: Where tensors come from.
            module: The module that made the call.
            outside: Whether no module did, but the step itself.
        """
        kind = "lookup" if self._looks_up() else self.op.kind
        layer = Layer("", self.frame.node.path, kind, outside=outside)
        call = Call(layer, self.frame.node, self.function, self.op, self.index, self.frame.training, visible=self.visible and not outside)
        call.after = self.frame.last
        call.in_place = self.in_place
        call.reads = [
            Read(slot, origin[0], origin[1], is_quantizable(t) and sources.quantizable(origin)) for slot, t, origin in self.dynamic
        ]
        constants = [(slot, tensor, parameters_of([origin])) for slot, tensor, origin in self.constants]
        call.weights = weights_of(self.op, constants, self.args)
        if self.op.constants:
            tensors = {slot: tensor for slot, tensor, _ in constants}
            call.weights = [replace(weight, cut_from=sources.cuts.of(tensors[weight.slot])) for weight in call.weights]
        if module is not None and not type(module).__module__.startswith("torch."):  # code of the user's own
            call.position = calling_position()
        call.layer = self._described(call, module)
        return call

    def _described(self, call: Call, module: nn.Module | None) -> Layer:
        quantizable = self._quantizable_outputs(call)
        weight = next((t for slot, t, _ in self.constants if call.weights and slot == call.weights[0].slot), None)
        read = [t for _, t, _ in self.dynamic]
        parameters = self._parameters(call)
        chosen = [t for weight in call.weights for slot, t, _ in self.constants if slot == weight.slot]
        layer = replace(
            call.layer,
            multiplications=multiplications(self.op, self.args, self.outputs, chosen),
            input_shapes=tuple(tuple(t.shape) for t in read),
            input_dtypes=tuple(dtype_name(t) for t in read),
            output_shapes=tuple(tuple(t.shape) for t in self.outputs),
            output_dtypes=tuple(dtype_name(t) for t in self.outputs),
            quantizable_outputs=quantizable,
            attributes={**attributes(self.op, module, self.args, self.kwargs, weight), **_modes(self.function, self.kwargs)},
            parameters=parameters,
            weighted=(self.op.category is Category.WEIGHTED and bool(call.weights))
            or (call.layer.kind == "lookup" and bool(parameters))
            or (self.op.category is Category.MATMUL and any(w.parameters for w in call.weights)),
            note=note_of(quantizable, self.mask_like, [t for _, t, _ in self.operands], self.outputs)
            or (_DRAWN if self._draws_weights() else "")
            or (_LOOKUP if call.layer.kind == "lookup" else "")
            or ("writes its result into tensors that it is given" if self.writes else ""),
            constant=self._constant(),
        )
        if self.op.category is Category.WEIGHTED:
            return replace(layer, attributes={**layer.attributes, **self._made_operands()})
        if not call.weights or self.op.category not in (Category.MATMUL, Category.COMPUTE):
            return layer
        # Which operand is constant decides what engines have a kernel for.
        first = call.weights[0].slot
        product = self.op.category is Category.MATMUL
        where: dict[str, object] = {"weight_first": True} if product and _before(first, call.reads[0].slot) else {}
        shapes = [tuple(t.shape) for slot, t, _ in self.constants if slot == first]
        return replace(layer, attributes={**layer.attributes, "operand_shape": shapes[0], **where})

    def _constant(self) -> Shape | None:
        """Shape of the constant that it multiplies what it reads by, or adds to it; `None`: it does something else."""
        if len(self.dynamic) != 1 or len(self.constants) != 1 or self.writes:
            return None
        (slot, tensor, _), (_, constant, origin) = self.dynamic[0], self.constants[0]
        if DRAWN in origin or not scales_and_shifts(self.op.kind, self.function, self.args, self.kwargs, slot):
            return None
        if not constant.is_floating_point() or (self.in_place and slot != (0,)):
            return None
        (result,) = self.outputs
        return tuple(constant.shape) if (result.shape, result.dtype) == (tensor.shape, tensor.dtype) else None

    def _draws_weights(self) -> bool:
        return self.op.category is Category.WEIGHTED and any(DRAWN in origin for _, _, origin in self.constants)

    def _made_operands(self) -> dict[str, object]:
        """Which of weight and bias are no constants, but made of the model's inputs, as in a network that makes the weights of another."""
        made = {slot[0] for slot, tensor, _ in self.dynamic if tensor.is_floating_point()}
        found: dict[str, object] = {}
        if self.op.weight is not None and made.intersection(self.op.weight):
            found["made_weight"] = True
        if self.op.biased and made.intersection((2, "bias")):
            found["made_bias"] = True
        return found

    def _quantizable_outputs(self, call: Call) -> tuple[bool, ...]:
        """Which outputs are floats and no masks."""
        reads_mask = any(not r.quantizable and t.is_floating_point() for r, (_, t, _) in zip(call.reads, self.dynamic, strict=True))
        masking = self.op.kind in MASKING or self.mask_like or reads_mask
        return tuple(t.is_floating_point() and not (masking and is_mask_like(t)) for t in self.outputs)

    def _looks_up(self) -> bool:
        """Whether it selects from a constant by integers that depend on the inputs: an embedding, written ``weight[indices]``.

        It makes values, though its function otherwise passes on those of a tensor that depends on the inputs.
        """
        if self.op.category is not Category.PRESERVE or not self.dynamic or any(t.is_floating_point() for _, t, _ in self.dynamic):
            return False
        return any(t.is_floating_point() for t in self.outputs)

    def _parameters(self, call: Call) -> tuple[str, ...]:
        """Names of the parameters that it reads, those of its weight first."""
        parameters = parameters_of([origin for _, _, origin in self.constants])
        first = call.weights[0].parameters if call.weights else ()
        return (*first, *(name for name in parameters if name not in first))


def _before(slot: ArgPath, other: ArgPath) -> bool:
    return all(isinstance(part, int) for part in (*slot, *other)) and [int(part) for part in slot] < [int(part) for part in other]


def _modes(function: str, kwargs: Mapping[str, Any]) -> dict[str, object]:
    """The mode of a division that rounds its result, and of an interpolation by the operator for one mode.

    >>> _modes("upsample_bilinear2d", {}), _modes("_upsample_nearest_exact1d", {}), _modes("div", {"rounding_mode": "floor"})
    ({'mode': 'bilinear'}, {'mode': 'nearest-exact'}, {'rounding_mode': 'floor'})
    """
    rounding = kwargs.get("rounding_mode")
    found = re.fullmatch(r"_?upsample_([a-z_]+)\d?d?(_aa)?", function)
    interpolation = {"mode": found[1].replace("_", "-")} if found else {}
    return interpolation if rounding is None else {**interpolation, "rounding_mode": rounding}
