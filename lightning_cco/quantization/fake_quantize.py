"""Fake-quantization: values rounded to the grid of an integer format, kept as floats, with straight-through gradients.

The grid of an affine tensor is ``(level - zero_point) * scale`` for the levels ``quant_min … quant_max``; that of a symmetric one is
``level * scale`` (Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018).

PyTorch's own operation is 20 to 30 times slower on a CPU than the memory allows and keeps a mask beside the tensor. Here a few in-place operations
on one fresh buffer do the same, and from 7 bits on the gradient's mask is read off the output, which the next layer keeps anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# With fewer bits the outermost levels hold too many values to take all of them for clipped.
_MASK_FROM_OUTPUT_BITS = 7
_SMALLEST_SCALE = 1e-12

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
        largest = weight.abs().amax()
    elif axis == 0:
        low, high = torch.aminmax(weight.flatten(1), dim=1) if weight.dim() > 1 else (weight, weight)
        largest = torch.maximum(-low, high).view(-1, *[1] * (weight.dim() - 1))
    else:
        largest = weight.abs().amax(dim=[d for d in range(weight.dim()) if d != axis], keepdim=True)
    return largest.float().div(quant_range(num_bits, symmetric=True)[1]).clamp(min=_SMALLEST_SCALE)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | float,
    num_bits: int,
    symmetric: bool = False,
    clamp: tuple[float, float] | None = None,
    inplace: bool = False,
    overwritten: bool = False,
) -> Tensor:
    """Round an activation to its grid; the gradient passes where the value lies inside the range.

    Args:
        x: Any shape, any float type; the arithmetic is in float32 at least.
        scale: 0-d float32.
        zero_point: 0-d float32, integer-valued; or a Python float, which is faster on a CPU.
        num_bits: Bits of the format.
        symmetric: Whether the levels are ``-limit … limit`` instead of ``0 … 2**num_bits - 1``.
        clamp: An activation to apply on the way: ``(0, inf)`` is ReLU, ``(0, 6)`` ReLU6. Its gradient is included.
        inplace: Overwrite ``x``.
        overwritten: Whether the caller goes on to overwrite the result, so that the gradient can't be read off it.

    Returns:
        A tensor of the shape and type of ``x``; ``x`` itself if ``inplace``.

    From 7 bits on, values that land on the outermost level count as clipped, and with a ReLU those that land on 0 count as negative: the gradient
    is read off the output. Below that it is that of `torch.fake_quantize_per_tensor_affine`.
    """
    quant_min, quant_max = quant_range(num_bits, symmetric)
    low: Bound = quant_min - zero_point
    high: Bound = quant_max - zero_point
    from_output = num_bits >= _MASK_FROM_OUTPUT_BITS and not overwritten
    limits = clamp if clamp is not None else (float("-inf"), float("inf"))
    result: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        x, scale, low, high, limits, from_output, inplace
    )
    return result


class _FakeQuantize(torch.autograd.Function):
    """``clamp(round(x / scale), low, high) * scale`` with ``low`` and ``high`` in levels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: Bound, high: Bound, limits: tuple[float, float], from_output: bool, inplace: bool
    ) -> Tensor:
        wide = x.dtype in (torch.float32, torch.float64)
        inside = None
        if inplace and not from_output:
            inside = _inside(x, scale, low, high, limits)
        first, last = _level_bounds(scale, low, high, limits)
        levels = x.div(scale) if wide else x.float().div_(scale)
        levels.round_().clamp_(first, last)  # type: ignore[arg-type]
        if inplace:
            # The last step writes into the argument, whatever its type.
            torch.mul(levels, scale, out=x) if wide else x.copy_(levels.mul_(scale))
            ctx.mark_dirty(x)
            result = x
        else:
            result = levels.mul_(scale) if wide else levels.mul_(scale).to(x.dtype)
        ctx.limits, ctx.from_output, ctx.masked = limits, from_output, inside is not None
        ctx.bounds = None if isinstance(low, Tensor) else (low, high)
        bounds = (low, high) if isinstance(low, Tensor) else ()
        ctx.save_for_backward(inside if inside is not None else result if from_output else x, scale, *bounds)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept, scale, *bounds = ctx.saved_tensors
        nothing = (None,) * 6
        if ctx.masked:
            return (grad * kept, *nothing)
        low, high = bounds or ctx.bounds
        if not ctx.from_output:
            return (grad * _inside(kept, scale, low, high, ctx.limits), *nothing)
        first, last = _level_bounds(scale, low, high, ctx.limits)
        if isinstance(first, Tensor) or isinstance(last, Tensor):
            return (grad * ((kept > first * scale) & (kept < last * scale)), *nothing)
        # Half a step inside the outermost levels, so that rounding of the product can't matter.
        step = float(scale)
        return (torch.ops.aten.hardtanh_backward(grad, kept, (first + 0.5) * step, (last - 0.5) * step), *nothing)


def _level_bounds(scale: Tensor, low: Bound, high: Bound, limits: tuple[float, float]) -> tuple[Bound, Bound]:
    """First and last level once the clamp of the activation is taken into account: rounding is monotone, so it may come after."""
    below, above = limits
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        first = torch.as_tensor(low) if below == float("-inf") else torch.maximum(torch.as_tensor(low), (below / scale).round())
        last = torch.as_tensor(high) if above == float("inf") else torch.minimum(torch.as_tensor(high), (above / scale).round())
        return first, last
    if below == 0.0:  # no need to know the scale
        low = max(low, 0.0)
    elif below != float("-inf"):
        low = max(low, float((below / scale).round()))
    if above != float("inf"):
        high = min(high, float((above / scale).round()))
    return low, high


def _inside(x: Tensor, scale: Tensor, low: Bound, high: Bound, limits: tuple[float, float]) -> Tensor:
    """Where the value is not clipped: by rounding, as torch's own operation judges, and not by the activation's clamp."""
    levels = (x.float() if x.dtype not in (torch.float32, torch.float64) else x).div(scale).round_()
    inside = (levels >= low) & (levels <= high)
    below, above = limits
    if below != float("-inf"):
        inside &= x > below
    if above != float("inf"):
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
        wide = weight.dtype in (torch.float32, torch.float64)
        levels = weight.div(scale) if wide else weight.float().div_(scale)
        result = levels.round_().mul_(scale)
        return result if wide else result.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, None
