"""Fake-quantization: values rounded to the grid of an integer format, kept as floats, with straight-through gradients.

The grid of an affine tensor is ``(level - zero_point) * scale`` for the levels ``quant_min … quant_max``; that of a symmetric one is
``level * scale`` (Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018).

PyTorch's own operation is 20 to 30 times slower on a CPU than the memory allows. Here one pass over the memory does the same where `native` has kernels, and
a few in-place operations on one fresh buffer elsewhere; both with the same results to the last bit, gradients included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_cco.compat.autograd import plain_apply
from lightning_cco.quantization import operations
from lightning_cco.quantization.differentiable_operations import fake_quantize_openly, where_clamp_passes
from lightning_cco.quantization.gradient_holders import fewest_holders, holders, known_holders
from lightning_cco.quantization.native import Kernels, ReadyGrid, kernels_for
from lightning_cco.quantization.qparams import NO_LIMITS, Grid, grid_of, grid_of_numbers, quant_range
from lightning_cco.quantization.small_tensors import round_small
from lightning_cco.quantization.tracing import behind_transforms, runs_plainly
from lightning_cco.quantization.triton_calls import TritonKernels, device_kernels_for, fitting_kernels

AnyKernels = Kernels | TritonKernels


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    num_bits: int,
    symmetric: bool = False,
    clamp: tuple[float, float] | None = None,
    inplace: bool = False,
    numbers: tuple[float, float] | None = None,
    extrema: Tensor | None = None,
) -> Tensor:
    """Round an activation to its grid. The gradient is that of `torch.fake_quantize_per_tensor_affine`: it passes where the rounded value is a level.

    Args:
        x: Any shape, any float type; the arithmetic is in float32 at least.
        scale: 0-d float32.
        zero_point: 0-d float32, integer-valued.
        num_bits: Bits of the format.
        symmetric: Whether the levels are ``-limit … limit`` instead of ``0 … 2**num_bits - 1``.
        clamp: An activation to apply on the way: ``(0, inf)`` is ReLU, ``(0, 6)`` ReLU6. Its gradient is included.
        inplace: Overwrite ``x``.
        numbers: Scale and zero point as Python floats, where they are known: reading them off a tensor takes longer than rounding a small one.
        extrema: float32 of 2, which widens to the smallest and the largest value after the clamp.

    Returns:
        A tensor of the shape and type of ``x``; ``x`` itself if ``inplace``.
    """
    limits = clamp if clamp is not None else NO_LIMITS
    if numbers is None:
        on_device = None if torch.compiler.is_compiling() else device_kernels_for(x)
        if on_device is not None and scale.device == x.device:
            return _by_kernels(x, on_device, (scale, zero_point, quant_range(num_bits, symmetric), limits), inplace, extrema)
        grid, kernels = grid_of(scale, zero_point, num_bits, symmetric, limits), None
    else:
        grid, kernels = grid_of_numbers(*numbers, num_bits, symmetric, limits), kernels_for(x)
    openly = kernels is None and not torch.compiler.is_compiling() and not runs_plainly()
    if extrema is not None and kernels is None:
        _widen_openly(extrema, x, limits) if openly else widen(extrema, x.detach(), limits)
    if openly:
        rounded = fake_quantize_openly(x, scale if numbers is None else numbers[0], grid)
        return x.copy_(rounded) if inplace else rounded
    if kernels is not None and numbers is not None:
        return _by_kernels(x, kernels, (numbers[0], (grid.first, grid.last), (grid.low, grid.high), limits), inplace, extrema)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _scaled(x, _levels(x, scale, inplace).clamp_(grid.first, grid.last), scale, inplace)  # type: ignore[arg-type]
    result: Tensor
    if torch.compiler.is_compiling() and isinstance(grid.low, Tensor) and isinstance(grid.high, Tensor):
        result = _FakeQuantizeTraced.apply(x.clone() if inplace else x, scale, grid.low, grid.high, grid)  # type: ignore[no-untyped-call]
        if inplace:
            x.copy_(result)
            return x
    else:
        result = _FakeQuantize.apply(x, scale, grid, inplace)  # type: ignore[no-untyped-call]
    return result


def fake_quantize_small(
    x: Tensor,
    grid: Callable[[Kernels, tuple[float, float] | None, torch.dtype], ReadyGrid],
    clamp: tuple[float, float] | None,
    inplace: bool,
    extrema: Tensor | None,
) -> Tensor | None:
    """The same for a small tensor in eager training, in the fewest steps; `None` where there is no such way. ``grid``: gives the grid."""
    kernels = kernels_for(x)
    return None if kernels is None else round_small(x, kernels, grid(kernels, clamp, x.dtype), inplace, extrema)


def widen(extrema: Tensor, x: Tensor, clamp: tuple[float, float] | None = None) -> None:
    """Widen ``extrema``, float32 of 2, to the smallest and the largest value of ``x`` after a clamp."""
    if not x.numel():
        return
    limits = clamp if clamp is not None else NO_LIMITS
    if operations.has_operations(x):
        extrema.copy_(operations.widened(extrema, x, limits))
        return
    ends = torch.stack(torch.aminmax(x)).float().clamp(*limits)
    extrema.copy_(torch.stack([torch.minimum(extrema[0], ends[0]), torch.maximum(extrema[1], ends[1])]))


def _widen_openly(extrema: Tensor, x: Tensor, limits: tuple[float, float]) -> None:
    with behind_transforms(x) as values:
        if values is not None:
            widen(extrema, values, limits)


def _levels(x: Tensor, scale: Tensor, inplace: bool) -> Tensor:
    """``round(x * (1 / scale))`` in at least float32; one fresh buffer at most."""
    inverse = scale.reciprocal()  # a division takes twice the time of a multiplication
    if x.dtype in (torch.float32, torch.float64):
        levels = x.mul_(inverse) if inplace else x.mul(inverse)
    else:
        levels = x.float().mul_(inverse)
    return levels.round_()


def _scaled(x: Tensor, levels: Tensor, scale: Tensor, inplace: bool) -> Tensor:
    values = levels.mul_(scale)
    if values.dtype == x.dtype:
        return x if inplace else values
    if not inplace:
        return values.to(x.dtype)
    x.copy_(values)
    return x  # what copy_ returns is another tensor to a compiler


class _FakeQuantize(torch.autograd.Function):
    """By torch operations, eagerly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, grid: Grid, inplace: bool) -> Tensor:
        active = where_clamp_passes(x, grid.limits)
        levels = _levels(x, scale, inplace)
        inside = (levels >= grid.low) & (levels <= grid.high)
        for condition in active:
            inside &= condition
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(inside)
        return _scaled(x, levels.clamp_(grid.first, grid.last), scale, inplace)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return torch.where(inside, grad, 0.0), None, None, None


class _FakeQuantizeTraced(torch.autograd.Function):
    """By torch operations, for compilers.

    The gradient is worked out from the input by float operations alone: a compiler fuses them with what is around, while it would store a mask of bools,
    which on a CPU takes many times longer than all the rest.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(x, scale, low, high)
        ctx.limits = grid.limits
        return _scaled(x, _levels(x, scale, False).clamp(grid.first, grid.last), scale, False)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale, low, high = ctx.saved_tensors
        levels = _levels(x, scale, False)
        # Levels are integers: beyond the ends by at least 1.
        passes = 1.0 - (levels - levels.clamp(low, high)).abs().clamp(max=1.0)
        for condition in where_clamp_passes(x, ctx.limits):
            passes = passes * condition
        return grad * passes.to(grad.dtype), *(None,) * 4


class _FakeQuantizeByKernel(torch.autograd.Function):
    """In one pass, with the mask in one bit per value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: AnyKernels, described: tuple[Any, ...], inplace: bool, extrema: Tensor | None) -> Tensor:
        mask = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)
        result = _run(kernels, x, described, inplace, mask, extrema)
        ctx.kernels, ctx.strides = kernels, x.stride()
        fewest_holders(x.device.type)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(mask)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        if torch.is_grad_enabled() or fitting_kernels(grad) is None or grad.stride() != ctx.strides:
            return torch.where(_unpacked(mask, grad.shape, ctx.strides), grad, 0.0), *(None,) * 4
        own = known_holders(grad.device.type)
        out = grad if own and holders(grad) in own else torch.empty_like(grad)
        ctx.kernels.mask_gradient(grad, out, mask)
        return out, *(None,) * 4


_with_gradient = plain_apply(_FakeQuantizeByKernel)  # kernels are only there where operations run plainly


def _by_kernels(x: Tensor, kernels: AnyKernels, described: tuple[Any, ...], inplace: bool, extrema: Tensor | None) -> Tensor:
    """``described``: the grid, as the kernels take it."""
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _with_gradient(x, kernels, described, inplace, extrema)
        return result
    return _run(kernels, x, described, inplace, None, extrema)


def _run(kernels: AnyKernels, x: Tensor, described: tuple[Any, ...], inplace: bool, mask: Tensor | None, extrema: Tensor | None) -> Tensor:
    out = x if inplace else torch.empty_like(x)
    run: Callable[..., Any] = kernels.fake_quantize
    run(x, out, *described, mask, extrema)
    if inplace:
        torch.autograd.graph.increment_version(x)
    return out


def _unpacked(mask: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """The mask as bools in the shape and order of the values that it is of."""
    bits = mask.unsqueeze(1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=mask.device)).bitwise_and_(1).bool().flatten()
    return bits[: shape.numel()].as_strided(shape, strides)
