"""Rounded weights are not kept until the backward, which would take the memory of all weights once more, but made again there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_cco.compat.autograd import saved_hooks_enabled, saved_hooks_on_top, storage_holders
from lightning_cco.errors import CCOError
from lightning_cco.quantization.native import Kernels
from lightning_cco.quantization.tracing import runs_plainly
from lightning_cco.quantization.triton_calls import TritonKernels, fitting_kernels

Arranged = tuple[Callable[[Tensor], Tensor], torch.Size]
LEAST_RECOMPUTED = (1 << 17) + 1
"""Values of a weight from which on its memory is worth the Python calls and the second rounding: half a megabyte."""


class _Scratch(threading.local):
    """Memory for one rounded weight at a time, of each thread its own: it stays in the processor's caches, which new memory for each layer would not."""

    def __init__(self) -> None:
        self.storage = torch.UntypedStorage(0, device="cpu")  # type: ignore[no-untyped-call]

    def take(self, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialized dense tensor: in the memory kept here unless another tensor is still in it, or it is too small."""
        size = shape.numel() * dtype.itemsize
        free = storage_holders(self.storage._cdata) == 1
        if not free or self.storage.nbytes() < size:
            self.storage = torch.UntypedStorage(size, device="cpu")  # type: ignore[no-untyped-call]
        return torch.empty(0, dtype=dtype, device="cpu").set_(self.storage, 0, shape, strides)


_scratch = _Scratch()


class RecomputedWeight:
    """A rounded weight that can be made again to the last bit, as long as the weight itself does not change.

    Args:
        weight: Of what it is.
        axis: Axis of the output channels.
        kernels: What makes it.
        arranged: What the kernels read of the weight, and the shape of that; `None`: the weight itself.
        affine: Whether the grids are affine.

    Attributes:
        scales: float32 with one value for each channel; of affine grids (2, channels), the scales and the levels of 0.
        limit: Largest level; both are written when the weight is made for the first time.
    """

    def __init__(
        self, weight: Tensor, axis: int, kernels: Kernels | TritonKernels, arranged: Arranged | None = None, affine: bool = False
    ) -> None:
        self.weight, self.axis, self.kernels = weight.detach(), axis, kernels
        self._arranged: Callable[[Tensor], Tensor] | None = None if arranged is None else arranged[0]
        self.shape = weight.shape if arranged is None else arranged[1]
        self._strides = weight.stride() if arranged is None else (self.shape[1], 1)
        self.affine, channels = affine, self.shape[axis]
        self.scales = torch.empty(
            (2, channels) if affine else channels, dtype=torch.float32, device=weight.device
        )  # by name: the defaults are the user's
        self.limit, self.address, self.version = 0, 0, weight._version

    def _read(self) -> Tensor:
        return self.weight if self._arranged is None else self._arranged(self.weight)

    def room(self) -> Tensor:
        """Memory for the rounded weight."""
        if self.weight.is_cpu:
            rounded = _scratch.take(self.shape, self._strides, self.weight.dtype)
        else:  # from the allocator, which knows which streams still read what was freed
            rounded = torch.empty_strided(self.shape, self._strides, dtype=self.weight.dtype, device=self.weight.device)
        self.address = rounded.data_ptr()
        return rounded

    def make(self) -> Tensor:
        """The rounded weight.

        Raises:
            CCOError: The weight has changed since the forward, where autograd raises an error in float.
        """
        if self.weight._version != self.version:
            raise CCOError(
                f"a weight of shape {tuple(self.weight.shape)} was modified in place between the forward and its backward (an optimizer's step?), so its "
                "gradient can't be computed, no more than in float. Run the backward before the weights change, or the forward again."
            )
        weight = self._read()
        if not runs_plainly() and self.affine:  # the backward under a transform (vectorized autograd) or a mode
            scales, zeros = self.scales.unsqueeze(-1)
            levels = torch.minimum(torch.maximum((weight.float() * scales.reciprocal()).round(), -zeros), self.limit - zeros)
            values: Tensor = (levels * scales).to(weight.dtype)
            return values
        if not runs_plainly():
            scales = self.scales.view([-1 if dim == self.axis else 1 for dim in range(weight.dim())])
            levels = (weight.float() * scales.reciprocal()).round().clamp(-self.limit, self.limit)
            return (levels * scales).to(weight.dtype)
        rounded = self.room()
        if self.affine:
            assert isinstance(self.kernels, Kernels)
            self.kernels.fake_quantize_affine_weight(weight, rounded, self.limit, 0.0, self.scales, known=True)
            return rounded
        self.kernels.fake_quantize_weight(weight, rounded, self.axis, self.limit, 0.0, self.scales, known=True)
        return rounded


def recomputed_weight(weight: Tensor, axis: int | None, arranged: Arranged | None = None, affine: bool = False) -> RecomputedWeight | None:
    """What makes a rounded weight again in the backward.

    Args:
        weight: The weight.
        axis: Axis of the output channels.
        arranged: What the kernels read of it, as for `RecomputedWeight`.
        affine: Whether the grids are affine, for which there are kernels on CPUs alone.

    `None` where that is not wanted: outside of an eager training forward, for small weights, and where somebody else, such as a checkpoint, handles
    what is saved, or nobody may.
    """
    if (
        axis is None
        or weight.numel() < LEAST_RECOMPUTED
        or not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or weight.is_inference()
    ):
        return None
    kernels = fitting_kernels(weight)
    if (
        kernels is None
        or (affine and not isinstance(kernels, Kernels))
        or not saved_hooks_enabled()
        or saved_hooks_on_top(False) is not None
    ):
        return None
    return RecomputedWeight(weight, axis, kernels, arranged, affine)


def saving_recomputed(func: Callable[..., Any], weights: Sequence[RecomputedWeight]) -> Callable[..., Any]:
    """The same function, but what autograd saves of rounded weights, views of them included, is made again when it is needed."""
    known = {weight.address: weight for weight in weights}

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        recomputed = known.get(tensor.data_ptr())
        if recomputed is None or tensor.numel() != recomputed.weight.numel():
            return tensor
        shape, strides = tensor.shape, tensor.stride()
        return lambda: recomputed.make().as_strided(shape, strides)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            return func(*args, **kwargs)

    return call


def _unpack(saved: Tensor | Callable[[], Tensor]) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved()
