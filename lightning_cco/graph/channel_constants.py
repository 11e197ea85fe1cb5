"""Multiplications and additions with one constant: which calls they are, and which factor and which shift they have.

``x * scale + bias`` with buffers is a batch norm whose statistics are frozen, ``x * gamma`` with a parameter is the LayerScale of ConvNeXt. Right after a
layer with weights they go into its weights and its bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_cco.graph.call import ArgPath

_PLACES = {0: 0, "input": 0, 1: 1, "other": 1}
_EITHER_FIRST = frozenset({"add", "mul"})
_KINDS = _EITHER_FIRST | {"sub", "div"}
_REVERSED = frozenset({"rsub", "__rsub__", "__rdiv__", "__rtruediv__"})


def scales_and_shifts(kind: str, function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], read: ArgPath) -> bool:
    """Whether a call with two tensors is ``factor · x + shift`` of the one that it reads, by the other.

    Args:
        kind: The kind of the layer.
        function: Name of the torch function.
        args: Positional arguments.
        kwargs: Keyword arguments.
        read: Where ``x`` stands among them.

    >>> x, c = torch.ones(2, 3), torch.ones(3)
    >>> scales_and_shifts("sub", "sub", (x, c), {}, (0,)), scales_and_shifts("sub", "sub", (c, x), {}, (1,))
    (True, False)
    """
    place = _PLACES.get(read[0]) if len(read) == 1 else None
    if kind not in _KINDS or place is None or len(args) > 2 or function in _REVERSED:
        return False
    if kwargs.get("alpha", 1) != 1 or kwargs.get("rounding_mode") is not None or kwargs.get("out") is not None:
        return False
    return kind in _EITHER_FIRST or place == 0


def factor_and_shift(kind: str, constant: Tensor) -> tuple[Tensor, Tensor | None]:
    """The factor and the shift of each channel, 1-d with one value for each, or one for all.

    Args:
        kind: The kind of the layer.
        constant: Its constant, float, all of whose axes but one have size 1.

    Returns:
        Both of the constant's data type; `None` for a shift of 0.

    >>> factor_and_shift("sub", torch.tensor([[[1.0]], [[2.0]]]))
    (tensor([1., 1.]), tensor([-1., -2.]))
    """
    values = constant.detach().reshape(-1)
    if kind in ("mul", "div"):
        return (values if kind == "mul" else values.reciprocal()), None
    return torch.ones_like(values), values if kind == "add" else -values


def constant_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], read: ArgPath) -> Tensor:
    """The other tensor of a call that reads one at a place."""
    tensors = dict(enumerate(args[:2])) | {_PLACES[name]: value for name, value in kwargs.items() if name in _PLACES}
    found = tensors[1 - _PLACES[read[0]]]
    assert isinstance(found, Tensor)
    return found


def along_axis(constant: tuple[int, ...], shape: tuple[int, ...], axis: int) -> bool:
    """Whether a constant has one value for each channel of a tensor, or one for all.

    Args:
        constant: Shape of the constant, which is aligned with the tensor's last axes.
        shape: Shape of the tensor.
        axis: The axis of its channels, from 0.

    >>> along_axis((16, 1, 1), (2, 16, 8, 8), 1), along_axis((8,), (2, 8, 8), 1), along_axis((), (2, 8), 1)
    (True, False, True)
    """
    if len(constant) > len(shape):
        return False
    aligned = (*[1] * (len(shape) - len(constant)), *constant)
    return all(size == 1 or (place == axis and size == shape[axis]) for place, size in enumerate(aligned))
