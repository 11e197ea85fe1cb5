"""What the operands of a call are: weights, biases, masks, activations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.masked import MaskedTensor

from lightning_cco.graph.call import ArgPath, Weight
from lightning_cco.graph.containers import tensors_in
from lightning_cco.graph.einsum_equations import output_axis
from lightning_cco.graph.ops import Category, Op
from lightning_cco.graph.origins import unwrapped

MASK_NOTE = "holds the huge values of a mask: with an INT8 scale for them all other values would round to 0"
SPARSE_NOTE = "no INT8 kernel takes sparse tensors"
_FIRST_INPUT = re.compile(r"\bweight_ih(?!_l[1-9])")
"""Of `torch.nn.LSTM`, its like, and their cells; the layers after the first read hidden states, all between -1 and 1."""
MASKING = {"masked_fill", "where", "triu", "tril", "setitem", "masked_scatter", "full"}


def operands_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[ArgPath, Tensor]]:
    """The tensors that a call reads, each with its slot. Tensors given as ``out=`` are written only."""
    found = tensors_in(tuple(args))
    return found + tensors_in({name: value for name, value in kwargs.items() if name != "out"}) if kwargs else found


def dtype_name(tensor: Tensor) -> str:
    """The data type as layers spell it: ``float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def is_mask_like(tensor: Tensor) -> bool:
    """Whether it holds the huge values that attention masks are made of: an INT8 scale over them would leave nothing of the rest."""
    tensor = unwrapped(tensor)
    if not tensor.is_floating_point() or tensor.is_nested or isinstance(tensor, MaskedTensor) or tensor.layout is not torch.strided:
        return False
    if tensor.is_meta or tensor.numel() == 0:
        return False
    try:
        low, high = torch.aminmax(tensor.detach())
    except NotImplementedError:  # a class of tensors of its own, such as the integer weights of torchao
        return False
    limit = 0.1 * torch.finfo(tensor.dtype).max
    return low.item() < -limit or high.item() > limit


def is_quantizable(tensor: Tensor) -> bool:
    """Whether it holds floats of ordinary size, in memory of their own each (a sparse tensor leaves zeros out)."""
    return tensor.is_floating_point() and tensor.layout is torch.strided and not is_mask_like(tensor)


def is_attention_mask(op: Op, slot: ArgPath) -> bool:
    """Whether an operand is the mask of an attention, which is added in float between its two products."""
    return op.mask is not None and slot[0] in op.mask


def note_of(quantizable: tuple[bool, ...], mask_like: bool, inputs: list[Tensor], outputs: list[Tensor]) -> str:
    """Why a layer can't be quantized whatever the settings say; empty when it can."""
    if any(t.is_complex() for t in [*inputs, *outputs]):
        return "no INT8 kernel takes complex numbers"
    if mask_like or any(not ok and t.is_floating_point() for ok, t in zip(quantizable, outputs, strict=True)):
        return MASK_NOTE
    if any(t.layout is not torch.strided for t in [*inputs, *outputs]):
        return SPARSE_NOTE
    if not any(t.is_floating_point() for t in outputs):
        return "integer"
    return ""


def weights_of(op: Op, constants: list[tuple[ArgPath, Tensor, tuple[str, ...]]], args: tuple[Any, ...]) -> list[Weight]:
    """Which constant operands are quantized with the layer, and along which axis."""
    floats = [(slot, t, names) for slot, t, names in constants if t.is_floating_point() and t.layout is torch.strided]
    if op.category is Category.WEIGHTED and op.weight is not None:
        position, keyword = op.weight
        if op.recurrent and _is_packed(args):
            position += 1
        chosen = [(s, t, n) for s, t, n in floats if s[0] in (position, keyword) and t.dim() > 1]
        if op.kind.endswith("_cell"):
            chosen = [(s, t, n) for s, t, n in floats if t.dim() == 2 and s[0] not in (0, 1, "input", "hx")]
        return [Weight(slot, names, 1 if _reads_features(names) else op.channel_axis, tuple(t.shape)) for slot, t, names in chosen]
    if op.category is Category.MATMUL:
        found = []
        for slot, t, names in floats:
            if t.dim() < 2 or (op.adds_first and slot[0] in (0, "input")) or is_attention_mask(op, slot):
                continue  # an added operand is a bias: it is rounded with the accumulator, not with the weight
            left = slot[0] == (1 if op.adds_first else 0)
            if op.kind == "einsum":
                axis = output_axis(args, slot, t)
            else:
                axis = None if t.dim() > 2 else (t.dim() - 2 if left else t.dim() - 1)
            found.append(Weight(slot, names, axis, tuple(t.shape)))
        return found
    if op.constants:
        return [Weight(slot, names, None) for slot, t, names in floats if t.numel() > 1]
    return []


def _reads_features(names: tuple[str, ...]) -> bool:
    """Whether a weight is that of a recurrent layer's own input, whose features may be of unlike size: each then has a scale of its own."""
    return any(_FIRST_INPUT.search(name) for name in names)


def _is_packed(args: tuple[Any, ...]) -> bool:
    """Whether a recurrent layer reads packed sequences: the sizes of the batches then stand before the hidden state."""
    return len(args) > 1 and isinstance(args[1], Tensor) and not args[1].is_floating_point()
