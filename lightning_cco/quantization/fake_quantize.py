"""Fake-quantization: values rounded to the grid of an integer format, kept as floats, with straight-through gradients.

The grid of an affine tensor is ``(level - zero_point) * scale`` for the levels ``quant_min … quant_max``; that of a symmetric one is
``level * scale`` (Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018).

PyTorch's own operation is 20 to 30 times slower on a CPU than the memory allows and keeps a mask beside the tensor. Here a few in-place operations
on one fresh buffer do the same, and from 7 bits on the gradient's mask is read off the output, which the next layer keeps anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# With fewer bits the outermost levels hold too many values to take all of them for clipped.
_MASK_FROM_OUTPUT_BITS = 7
_SMALLEST_SCALE = 1e-12
_INF = float("inf")

Bound = float | Tensor


def quant_range(num_bits: int, symmetric: bool) -> tuple[int, int]:
    """Lowest and highest integer level.

    >>> quant_range(8, symmetric=True), quant_range(8, symmetric=False)
    ((-127, 127), (0, 255))
    """
    if symmetric:
        limit = 2 ** (num_bits - 1) - 1
        return -limit, limit
    return 0, 2**num_bits - 1


def affine_qparams(min_val: Tensor, max_val: Tensor, num_bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range, which is widened to contain 0 so that 0 is represented exactly.

    Args:
        min_val: Smallest value, 0-d float32.
        max_val: Largest value, 0-d float32.
        num_bits: Bits of the format.
        symmetric: Whether the zero point must be 0.

    Returns:
        Two 0-d float32 tensors; the zero point is integer-valued. A range of nothing but 0 gets the scale of ±1.

    >>> affine_qparams(torch.tensor(-1.0), torch.tensor(254.0), 8)
    (tensor(1.), tensor(1.))
    """
    quant_min, quant_max = quant_range(num_bits, symmetric)
    low, high = min_val.clamp(max=0.0), max_val.clamp(min=0.0)
    span = 2.0 * torch.maximum(-low, high) if symmetric else high - low
    scale = torch.where(span > 0, span, torch.ones_like(span)).div(quant_max - quant_min).clamp(min=_SMALLEST_SCALE)
    zero_point = torch.zeros_like(scale) if symmetric else (quant_min - low / scale).round().clamp(quant_min, quant_max)
    return scale, zero_point


def weight_scale(weight: Tensor, num_bits: int, axis: int | None) -> Tensor:
    """Symmetric scale from the largest magnitude of each channel, or of the whole tensor.

    Args:
        weight: Any shape.
        num_bits: Bits of the format.
        axis: Axis of the output channels; `None`: one scale.

    Returns:
        float32 of the weight's number of dimensions, size 1 except along ``axis``; 0-d without an axis.
    """
    weight = weight.detach()
    if axis is None:
        high, low = weight.amax(), weight.amin()
    else:
        # The axes behind the channels first: one reduction over axes on both sides of one that stays is many times slower.
        high = low = weight
        for dims in (tuple(range(axis + 1, weight.dim())), tuple(range(axis))):
            if dims:
                high, low = high.amax(dims, keepdim=True), low.amin(dims, keepdim=True)
    largest = torch.maximum(high, -low)
    return largest.float().div(quant_range(num_bits, symmetric=True)[1]).clamp(min=_SMALLEST_SCALE)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    num_bits: int,
    symmetric: bool = False,
    clamp: tuple[float, float] | None = None,
    inplace: bool = False,
    apart: bool = False,
    numbers: tuple[float, float] | None = None,
) -> Tensor:
    """Round an activation to its grid; the gradient passes where the value lies inside the range.

    Args:
        x: Any shape, any float type; the arithmetic is in float32 at least.
        scale: 0-d float32.
        zero_point: 0-d float32, integer-valued.
        num_bits: Bits of the format.
        symmetric: Whether the levels are ``-limit … limit`` instead of ``0 … 2**num_bits - 1``.
        clamp: An activation to apply on the way: ``(0, inf)`` is ReLU, ``(0, 6)`` ReLU6. Its gradient is included.
        inplace: Overwrite ``x``.
        apart: Whether what the gradient needs is to be kept beside the result, in half its size: because the result is going to be overwritten, or
            because nothing that reads it keeps it.
        numbers: Scale and zero point as Python floats, where they are known: clamping to tensors is four times slower on a CPU.

    Returns:
        A tensor of the shape and type of ``x``; ``x`` itself if ``inplace``.

    From 7 bits on, values that land on the outermost level count as clipped, and with a ReLU those that land on 0 count as negative: the gradient
    is read off the output. Below that it is that of `torch.fake_quantize_per_tensor_affine`.
    """
    quant_min, quant_max = quant_range(num_bits, symmetric)
    offset = zero_point if numbers is None else numbers[1]
    low, high = quant_min - offset, quant_max - offset
    number = None if numbers is None else numbers[0]
    limits = clamp if clamp is not None else (-_INF, _INF)
    first, last = _level_bounds(scale if number is None else number, low, high, limits)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _rounded(x, scale, first, last, inplace)
    result: Tensor
    if num_bits < _MASK_FROM_OUTPUT_BITS:
        result = _FakeQuantizeFewBits.apply(x, scale, (low, high), (first, last), limits, inplace)  # type: ignore[no-untyped-call]
    else:
        result = _FakeQuantize.apply(x, scale, number, first, last, apart, inplace)  # type: ignore[no-untyped-call]
    return result


def _rounded(x: Tensor, scale: Tensor, first: Bound, last: Bound, inplace: bool) -> Tensor:
    """``clamp(round(x * (1 / scale)), first, last) * scale``: one fresh buffer at most, and four operations on it."""
    return _scaled(x, _levels(x, scale, first, last, inplace), scale, inplace)


def _levels(x: Tensor, scale: Tensor, first: Bound, last: Bound, inplace: bool) -> Tensor:
    inverse = scale.reciprocal()  # a division takes twice the time of a multiplication
    if x.dtype in (torch.float32, torch.float64):
        levels = x.mul_(inverse) if inplace else x.mul(inverse)
    else:
        levels = x.float().mul_(inverse)
    return levels.round_().clamp_(first, last)  # type: ignore[arg-type]


def _scaled(x: Tensor, levels: Tensor, scale: Tensor, inplace: bool) -> Tensor:
    values = levels.mul_(scale)
    if values.dtype == x.dtype:
        return x if inplace else values
    if not inplace:
        return values.to(x.dtype)
    x.copy_(values)
    return x  # what copy_ returns is another tensor to the compiler


class _FakeQuantize(torch.autograd.Function):
    """Rounding to levels from ``first`` to ``last``, Python floats if ``number``, the scale as one, is known. The gradient passes between the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, number: float | None, first: Bound, last: Bound, apart: bool, inplace: bool) -> Tensor:
        levels = _levels(x, scale, first, last, inplace)
        # bfloat16 holds the integers up to 256.
        kept = levels.to(torch.bfloat16) if apart else None
        result = _scaled(x, levels, scale, inplace)
        if inplace:
            ctx.mark_dirty(x)
        # Half a step inside the outermost levels, so that rounding of a product can't matter.
        below, above = first + 0.5, last - 0.5
        unit: Bound = 1.0
        if kept is None:
            kept, unit = result, scale if number is None else number
            below, above = below * unit, above * unit
        if isinstance(below, Tensor):
            ctx.save_for_backward(kept, 0.5 * (below + above), 0.5 * (above - below), torch.full_like(scale, 4.0) / unit)
        else:
            ctx.save_for_backward(kept)
            ctx.bounds = below, above
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept, *interval = ctx.saved_tensors
        if interval:
            # A mask made of floats: compilers for CPUs store bools many times slower. What is inside is so by half a step at least.
            middle, half, slope = interval
            grad = grad * (half - (kept.float() - middle).abs()).mul(slope).clamp(0.0, 1.0).to(grad.dtype)
        else:
            grad = torch.ops.aten.hardtanh_backward(grad, kept.to(grad.dtype), *ctx.bounds)
        return grad, *(None,) * 6


class _FakeQuantizeFewBits(torch.autograd.Function):
    """The same with the gradient of torch's own operation: it passes wherever the rounded value is a level."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        ends: tuple[Bound, Bound],
        bounds: tuple[Bound, Bound],
        limits: tuple[float, float],
        inplace: bool,
    ) -> Tensor:
        # In place the input is gone when the gradient comes: what is inside must be known now.
        inside = _inside(x, scale, *ends, limits) if inplace else None
        result = _rounded(x, scale, *bounds, inplace)
        ctx.limits, ctx.masked = limits, inside is not None
        if inside is not None:
            ctx.mark_dirty(x)
            ctx.save_for_backward(inside)
        elif isinstance(ends[0], Tensor):  # of the scale a copy: a range may move on before the gradient comes
            ctx.save_for_backward(x, scale.clone(), *ends)
        else:
            ctx.save_for_backward(x, scale.clone())
            ctx.ends = ends
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept, *others = ctx.saved_tensors
        if not ctx.masked:
            scale, low, high = others if len(others) == 3 else (*others, *ctx.ends)
            kept = _inside(kept, scale, low, high, ctx.limits)
        return grad * kept, *(None,) * 5


def _level_bounds(scale: Bound, low: Bound, high: Bound, limits: tuple[float, float]) -> tuple[Bound, Bound]:
    """First and last level once the clamp of the activation is taken into account: rounding is monotone, so it may come after."""
    below, above = limits
    if isinstance(scale, Tensor):
        first = low if below == -_INF else torch.maximum(low, (below * scale.reciprocal()).round())  # type: ignore[arg-type]
        last = high if above == _INF else torch.minimum(high, (above * scale.reciprocal()).round())  # type: ignore[arg-type]
        return first, last
    if below == 0.0:
        low = max(low, 0.0)
    elif below != -_INF:
        low = max(low, _level(below, scale))
    return low, high if above == _INF else min(high, _level(above, scale))


def _level(value: float, scale: float) -> float:
    """Nearest level, by float32 arithmetic as for the values themselves: both must fall on the same side of a tie."""
    return float(np.rint(np.float32(value) * (np.float32(1.0) / np.float32(scale))))


def _inside(x: Tensor, scale: Tensor, low: Bound, high: Bound, limits: tuple[float, float]) -> Tensor:
    """Where the value is not clipped: by rounding, as torch's own operation judges, and not by the activation's clamp."""
    levels = (x.float() if x.dtype not in (torch.float32, torch.float64) else x).mul(scale.reciprocal()).round_()
    inside = (levels >= low) & (levels <= high)
    below, above = limits
    if below != -_INF:
        inside &= x > below
    if above != _INF:
        inside &= x < above
    return inside


def fake_quantize_weight(weight: Tensor, num_bits: int, axis: int | None) -> Tensor:
    """Round a weight to the symmetric grid of its own largest magnitudes. Nothing clips, so the gradient is that of the identity.

    Args:
        weight: Any shape, any float type.
        num_bits: Bits of the format.
        axis: Axis of the output channels; `None`: one scale for all.
    """
    result: Tensor = _FakeQuantizeWeight.apply(  # type: ignore[no-untyped-call]
        weight, num_bits, axis
    )
    return result


class _FakeQuantizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, num_bits: int, axis: int | None) -> Tensor:
        scale = weight_scale(weight, num_bits, axis)
        inverse = scale.reciprocal()
        if weight.dtype in (torch.float32, torch.float64):
            return weight.mul(inverse).round_().mul_(scale)
        return weight.float().mul_(inverse).round_().mul_(scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, None
