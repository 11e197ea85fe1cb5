"""Calls that PyTorch's exporter writes wrongly, or not at all, spelled as it writes them rightly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_cco.graph.layer import Layer
from lightning_cco.quantization.groups import has_statistics

_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def for_the_exporter(layer: Layer, func: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a layer, or what the exporter is to be shown in its place.

    Args:
        layer: The layer.
        func: Its function.
    """
    if layer.kind == "batch_norm" and not has_statistics(layer):
        return norm_by_batch
    if layer.kind == "concat":
        return _STACKED.get(getattr(func, "__name__", ""), func)
    spelled = _SPELLED.get(layer.kind)
    return spelled(func) if spelled is not None else func


def norm_by_batch(*args: Any, **kwargs: Any) -> Tensor:
    """`torch.nn.functional.batch_norm` by the statistics of the batch: with running ones given, the exporter writes an operator that reads those.

    >>> import torch
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> norm_by_batch(x, torch.zeros(1), torch.ones(1), training=True).round().tolist()
    [[-1.0], [1.0]]
    """
    call = {**dict(zip(_BATCH_NORM, args, strict=False)), **kwargs}
    return F.batch_norm(call["input"], None, None, call.get("weight"), call.get("bias"), True, eps=call.get("eps", 1e-5))


def clamped_to_floats(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A clamp of floats whose limits are floats: with one integer and one float among them the exporter finds no operator.

    Args:
        func: `torch.clamp`, or another spelling of it.

    >>> import torch
    >>> clamped_to_floats(torch.clamp)(torch.tensor([3.0]), 0.5, max=2)
    tensor([2.])
    """

    def clamped(*args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs["input"]
        if not x.is_floating_point():  # of integers it would make floats
            return func(*args, **kwargs)
        return func(*map(_as_float, args), **{name: _as_float(value) for name, value in kwargs.items()})

    return clamped


def of_one_type(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A difference of a tensor of the result's type: for a float less integers (``1.0 - attention_mask``) the exporter finds no operator.

    Args:
        func: `torch.sub`, or another spelling of it.

    >>> import torch
    >>> of_one_type(torch.rsub)(torch.tensor([1, 0]), 1.0)
    tensor([0., 1.])
    """

    def subtracted(x: Any, other: Any, **kwargs: Any) -> Tensor:
        if isinstance(x, Tensor) and not isinstance(other, Tensor):
            x = x.to(torch.result_type(x, other))
        return func(x, other, **kwargs)

    return subtracted


def divided_and_rounded(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A floor division as a division that is rounded down: of floats, the exporter knows that one alone.

    Args:
        func: `torch.floor_divide`, or another spelling of it.

    >>> import torch
    >>> divided_and_rounded(torch.floor_divide)(torch.tensor([-3.0, 3.0]), 2)
    tensor([-2.,  1.])
    """
    reverse = getattr(func, "__name__", "") == "__rfloordiv__"

    def divided(x: Any, other: Any, **kwargs: Any) -> Tensor:
        if not torch.result_type(x, other).is_floating_point:
            return func(x, other, **kwargs)
        first, second = (other, x) if reverse else (x, other)
        result: Tensor = torch.div(torch.as_tensor(first), second, rounding_mode="floor", **kwargs)
        return result

    return divided


def hstack(tensors: Sequence[Tensor], **kwargs: Any) -> Tensor:
    """`torch.hstack` as a concatenation: the exporter writes a sequence for it, which engines keep in floats.

    >>> import torch
    >>> hstack([torch.zeros(2, 1), torch.ones(2, 1)]).tolist()
    [[0.0, 1.0], [0.0, 1.0]]
    """
    whole = [_atleast(tensor, 1) for tensor in tensors]  # one by one: of several at once it makes a sequence, too
    return torch.cat(whole, 0 if whole[0].dim() == 1 else 1, **kwargs)


def vstack(tensors: Sequence[Tensor], **kwargs: Any) -> Tensor:
    """`torch.vstack` as a concatenation.

    >>> import torch
    >>> vstack([torch.zeros(2), torch.ones(2)]).tolist()
    [[0.0, 0.0], [1.0, 1.0]]
    """
    return torch.cat([_atleast(tensor, 2) for tensor in tensors], 0, **kwargs)


def dstack(tensors: Sequence[Tensor], **kwargs: Any) -> Tensor:
    """`torch.dstack` as a concatenation.

    >>> import torch
    >>> dstack([torch.zeros(1), torch.ones(1)]).tolist()
    [[[0.0, 1.0]]]
    """
    return torch.cat([_atleast(tensor, 3) for tensor in tensors], 2, **kwargs)


def column_stack(tensors: Sequence[Tensor], **kwargs: Any) -> Tensor:
    """`torch.column_stack` as a concatenation.

    >>> import torch
    >>> column_stack([torch.zeros(2), torch.ones(2)]).tolist()
    [[0.0, 1.0], [0.0, 1.0]]
    """
    return torch.cat([tensor if tensor.dim() > 1 else tensor.reshape(-1, 1) for tensor in tensors], 1, **kwargs)


def _atleast(tensor: Tensor, dimensions: int) -> Tensor:
    """`torch.atleast_1d`, `torch.atleast_2d` or `torch.atleast_3d`, which PyTorch leaves without types."""
    made: Tensor = getattr(torch, f"atleast_{dimensions}d")(tensor)
    return made


_STACKED: dict[str, Callable[..., Tensor]] = {
    "hstack": hstack,
    "vstack": vstack,
    "dstack": dstack,
    "row_stack": vstack,
    "column_stack": column_stack,
}


_SPELLED: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Tensor]]] = {
    "clamp": clamped_to_floats,
    "sub": of_one_type,
    "floor_divide": divided_and_rounded,
    "floordiv": divided_and_rounded,
    "rfloordiv": divided_and_rounded,
    "ifloordiv": divided_and_rounded,
}


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) else value
