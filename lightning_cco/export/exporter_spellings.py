"""Calls that PyTorch's exporter writes wrongly, or not at all, spelled as it writes them rightly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    return clamped_to_floats(func) if layer.kind == "clamp" else func


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


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) else value
