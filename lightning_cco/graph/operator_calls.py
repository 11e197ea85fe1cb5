"""Calls of operators (``torch.ops.aten.conv2d.default``), as exported programs make them, told as the functions of `torch` that they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lightning_cco.compat.operators import OpOverload, OpOverloadPacket

_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
_BATCH_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
_EMBEDDING = ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse")
_ORDERS: dict[str, tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...]]] = {
    "batch_norm": (F.batch_norm, _BATCH_NORM, ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")),
    "embedding": (F.embedding, _EMBEDDING, ("input", "weight")),
}
"""Functions that take their arguments in another order than the operator of the same name: function, order of the operator, what goes by position."""

_DIRECT = {torch.batch_norm: "batch_norm", torch.embedding: "embedding"}


def is_operator(func: Any) -> bool:
    """Whether a function mode was shown an operator, or a function that has an operator's order of arguments, instead of one of `torch`'s functions."""
    return isinstance(func, (OpOverload, OpOverloadPacket)) or func in _DIRECT


def is_custom(func: Any) -> bool:
    """Whether a function is an operator outside of PyTorch's own, as `torch.library.custom_op` makes them.

    >>> is_custom(torch.ops.aten.add.Tensor), is_custom(torch.relu)
    (False, False)
    """
    return isinstance(func, (OpOverload, OpOverloadPacket)) and _library(func)[0] not in ("aten", "prims", "prim")


def _library(func: Any) -> tuple[str, str]:
    library, _, name = (func._schema.name if isinstance(func, OpOverload) else func._qualified_op_name).partition("::")
    return str(library), str(name)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def name_of_operator(func: Any) -> str:
    """The name of an operator without its overload; outside of PyTorch's own, with its library in front, since ``mine::linear`` may compute anything.

    >>> name_of_operator(torch.ops.aten.add.Tensor), name_of_operator(torch.ops.aten.relu)
    ('add', 'relu')
    """
    if func in _DIRECT:
        return _DIRECT[func]
    library, name = _library(func)
    return name if library == "aten" else f"{library}_{name}"


def as_function(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    """The call of an operator as the function of that name takes its arguments."""
    known = _ORDERS.get(name)
    if known is None:
        return func, args, kwargs
    function, order, positional = known
    given = dict(zip(order, args, strict=False)) | {key: value for key, value in kwargs.items() if key in order}
    if name == "embedding":
        given["padding_idx"] = None if given.get("padding_idx", -1) == -1 else given["padding_idx"]
    return function, tuple(given.pop(key) for key in positional if key in given), given
