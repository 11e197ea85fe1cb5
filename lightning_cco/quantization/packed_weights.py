"""Rounded weights wait for the backward as int8: a quarter of the memory that the float copies of all layers would take until then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_cco.quantization.native import Kernels, kernels_for

# Smaller weights are not worth the two Python calls.
_SMALLEST = 1 << 14


class _Scratch(threading.local):
    """Memory for one rounded weight at a time, of each thread its own: it stays in the processor's caches, which new memory for each layer would not."""

    def __init__(self) -> None:
        self.storage = torch.UntypedStorage(0)  # type: ignore[no-untyped-call]

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor: in the memory kept here unless another tensor is still in it, or it is too small."""
        size = shape.numel() * dtype.itemsize
        free = torch._C._storage_Use_Count(self.storage._cdata) == 1
        if not free or self.storage.nbytes() < size:
            self.storage = torch.UntypedStorage(size)  # type: ignore[no-untyped-call]
        return torch.empty(0, dtype=dtype).set_(self.storage, 0, shape)  # type: ignore[call-overload, no-any-return]


_scratch = _Scratch()


class PackedWeight:
    """A rounded weight's levels and scales, from which it can be made again to the last bit.

    Args:
        weight: Of what it is, contiguous.
        axis: Axis of the output channels.
        kernels: What makes it.

    Attributes:
        levels: int8 of the weight's shape.
        scales: float32 with one value for each channel.
    """

    def __init__(self, weight: Tensor, axis: int, kernels: Kernels) -> None:
        self.axis, self.dtype, self.kernels = axis, weight.dtype, kernels
        self.levels = torch.empty(weight.shape, dtype=torch.int8)
        self.scales = torch.empty(weight.shape[axis])
        self.address = 0

    def room(self) -> Tensor:
        """Memory for the rounded weight."""
        weight = _scratch.take(self.levels.shape, self.dtype)
        self.address = weight.data_ptr()
        return weight

    def unpack(self) -> Tensor:
        """The rounded weight."""
        weight = self.room()
        self.kernels.dequantize_weight(self.levels, self.scales, weight, self.axis)
        return weight


def packed_weight(weight: Tensor, axis: int | None) -> PackedWeight | None:
    """Room for the levels of a weight, where they are wanted: in an eager training forward whose saved tensors nobody else handles, such as a checkpoint."""
    if axis is None or weight.numel() < _SMALLEST or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    kernels = kernels_for(weight) if weight.is_contiguous() else None
    autograd = torch._C._autograd
    if kernels is None or autograd._top_saved_tensors_default_hooks(False) is not None:
        return None
    return PackedWeight(weight, axis, kernels)


def saving_packed(func: Callable[..., Any], weights: Sequence[PackedWeight]) -> Callable[..., Any]:
    """The same function, but what autograd saves of rounded weights, views of them included, is packed."""
    known = {weight.address: weight for weight in weights}

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        packed = known.get(tensor.data_ptr())
        if packed is None or tensor.numel() != packed.levels.numel():
            return tensor
        shape, strides = tensor.shape, tensor.stride()
        return lambda: packed.unpack().as_strided(shape, strides)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            return func(*args, **kwargs)

    return call


def _unpack(saved: Tensor | Callable[[], Tensor]) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved()
