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

_DIRECT = {
    torch.batch_norm: "batch_norm",
    torch.embedding: "embedding",
    torch.convolution: "convolution",
    torch._convolution: "_convolution",
}
OTHER_NAMES = frozenset({"convolution", "_convolution"})
"""Names of functions that are told under another name."""
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
_SIZES = ("stride", "padding", "dilation", "output_padding")
_CONVOLUTIONS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
_TRANSPOSED = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}
"""By the number of dimensions of the kernel."""


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


def as_function(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The call of an operator as a function takes its arguments: name, function, arguments."""
    name = name_of_operator(func)
    if name in OTHER_NAMES:
        return _convolution(name, func, args, kwargs)
    return name, *_reordered(name, func, args, kwargs)


def _convolution(
    name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The one operator that every convolution becomes in a program of few operators, as the function that has its dimensions and direction."""
    call = {**dict(zip(_CONVOLUTION, args, strict=False)), **kwargs}
    dimensions = call["weight"].dim() - 2
    function = (_TRANSPOSED if call["transposed"] else _CONVOLUTIONS).get(dimensions)
    if function is None or "out" in kwargs:
        return name, func, args, kwargs
    # The operator takes one number for all dimensions, which the exporter writes as it is.
    sizes = {key: list(call[key]) * (dimensions if len(call[key]) == 1 else 1) for key in _SIZES}
    given = (call["input"], call["weight"], call["bias"], sizes["stride"], sizes["padding"])
    if call["transposed"]:
        return function.__name__, function, (*given, sizes["output_padding"], call["groups"], sizes["dilation"]), {}
    return function.__name__, function, (*given, sizes["dilation"], call["groups"]), {}


def _reordered(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    known = _ORDERS.get(name)
    if known is None:
        return func, args, kwargs
    function, order, positional = known
    given = dict(zip(order, args, strict=False)) | {key: value for key, value in kwargs.items() if key in order}
    if name == "embedding":
        given["padding_idx"] = None if given.get("padding_idx", -1) == -1 else given["padding_idx"]
    return function, tuple(given.pop(key) for key in positional if key in given), given
