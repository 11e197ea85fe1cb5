"""Fake-quantization of small tensors in training, where calls of Python cost more than the values: autograd's own nodes give the gradient.

Rounding is monotone, so the values that have a gradient lie between two numbers, and the gradient is that of a clamp between them (hardtanh). A clamp's node
costs a tenth of a Python function's; it keeps its input until the backward, four bytes a value instead of one bit. A kernel then writes the rounded values
into the clamp's result, which no gradient reads. To the last bit the same as `fake_quantize` and `fake_quantize_weight`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, is_grad_enabled

from lightning_cco.quantization.native import Kernels, ReadyGrid
from lightning_cco.quantization.tracing import runs_plainly
from lightning_cco.quantization.triton_calls import TritonKernels

SMALL = 1 << 16
"""Values of a tensor up to which the memory of its float values until the backward is worth the time."""


def has_small_gradient(x: Tensor) -> bool:
    """Whether operations run plainly, a gradient is asked for, and a tensor is small."""
    return x.requires_grad and is_grad_enabled() and runs_plainly() and x.numel() <= SMALL  # traced tensors have no numbers to compare


def round_small(x: Tensor, kernels: Kernels, grid: ReadyGrid, inplace: bool, extrema: Tensor | None) -> Tensor | None:
    """Round an activation.

    Args:
        x: One that the kernels may work on, and that has a gradient.
        kernels: The kernels.
        grid: Its grid.
        inplace: Overwrite ``x``.
        extrema: float32 of 2, which widens to the smallest and the largest value after the clamp.

    Returns:
        The rounded tensor, ``x`` itself if ``inplace``; `None`, and nothing is changed, where this can't be used: with a NaN, to which the kernel gives no
        gradient and a clamp does; for views and leaves, which autograd does not let be overwritten.
    """
    if grid.low >= grid.high:
        return None
    if not inplace:
        rounded = F.hardtanh(x, grid.low, grid.high)
        return rounded if kernels.round_made(x, rounded, grid, extrema) else None
    if x.is_leaf or x._is_view() or x.retains_grad:
        return None
    kept = x.clone()
    rounded = F.hardtanh(kept, grid.low, grid.high)
    if not kernels.round_made(kept, rounded, grid, extrema):
        return None
    return x.detach_().copy_(rounded)  # detached, since what was overwritten has no gradient, not even one of zeros


def round_small_weight(weight: Tensor, kernels: Kernels | TritonKernels, axis: int, limit: int, smallest_scale: float, mse: bool) -> Tensor:
    """Round a dense weight; the gradient is that of the identity."""
    rounded = weight.clone()
    kernels.round_made_weight(rounded, axis, limit, smallest_scale, mse)
    return rounded
