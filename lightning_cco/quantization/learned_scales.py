"""Rounding with scales that are learned: the gradients of LSQ and LSQ+ (Esser et al., 2020; Bhalgat et al., 2020).

A value in steps of its scale is clipped to the first and the last level, then rounded straight through. So the scale has the gradient ``round(u) - u``
where the value ``u = x / s`` lies between them, and the level that it is clipped to elsewhere; the offset of an affine format has that of what is clipped.
Both are multiplied by ``1 / sqrt(N * Qp)`` of N values and the last level Qp, so that their ratio to the scale is that of a weight's gradient to the weight.

Scales are no parameters of the model. Each has a *probe*, a leaf tensor of zeros that gets their gradient in its place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_cco.quantization.differentiable_operations import rounded_weight
from lightning_cco.quantization.fake_quantize import fake_quantize
from lightning_cco.quantization.qparams import INF, NO_LIMITS, quant_range


def learned_activation(
    x: Tensor,
    probe: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    num_bits: int,
    symmetric: bool,
    clamp: tuple[float, float] | None,
    numbers: tuple[float, float] | None,
) -> Tensor:
    """Round an activation; the values are those of `fake_quantize`, the gradients those of LSQ+.

    Args:
        x: Any shape, any float type.
        probe: float32 of 2: gets the gradients of the scale and of the offset ``-zero_point * scale``.
        scale: 0-d float32.
        zero_point: 0-d float32, integer-valued.
        num_bits: Bits of the format.
        symmetric: As for `fake_quantize`.
        clamp: As for `fake_quantize`.
        numbers: As for `fake_quantize`.
    """
    result: Tensor = _LearnedActivation.apply(x, probe, scale, zero_point, num_bits, symmetric, clamp, numbers)  # type: ignore[no-untyped-call]
    return result


class _LearnedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probe: Tensor, scale: Tensor, zero_point: Tensor, *format_: Any) -> Tensor:
        num_bits, symmetric, clamp, numbers = format_
        ctx.num_bits, ctx.symmetric, ctx.limits = num_bits, symmetric, clamp or NO_LIMITS
        # Scale and zero point move in place, maybe before this backward.
        ctx.save_for_backward(x, scale.clone(), zero_point.clone())
        return fake_quantize(x.detach(), scale, zero_point, num_bits, symmetric, clamp, False, numbers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale, zero_point = ctx.saved_tensors
        quant_min, quant_max = quant_range(ctx.num_bits, ctx.symmetric)
        below, above = ctx.limits
        values = x if x.dtype == torch.float64 else x.float()
        steps = values.clamp(below, above).mul_(scale.reciprocal()) if ctx.limits != NO_LIMITS else values * scale.reciprocal()
        clipped = steps.clamp(quant_min - zero_point, quant_max - zero_point)
        outside = steps != clipped
        # Inside round(u) - u; outside the level itself, counted from the offset.
        inner = torch.where(outside, clipped + zero_point, clipped.round().sub_(clipped))
        wide = grad.to(steps.dtype)
        of_scale, of_offset = (wide * inner).sum(), (wide * outside).sum()
        factor = 1.0 / math.sqrt(max(1, x.numel()) * quant_max)
        probe = torch.stack([of_scale, of_offset]).float() * factor
        passes = ~outside
        for condition in ((x > below) if below != -INF else None, (x < above) if above != INF else None):
            passes = passes if condition is None else passes.logical_and_(condition)
        return grad * passes, probe, *(None,) * 6


def learned_weight(weight: Tensor, probe: Tensor, scales: Tensor, limit: int) -> Tensor:
    """Round a weight with the gradients of LSQ.

    Args:
        weight: Any shape, any float type.
        probe: Gets the gradient of the scales, in their shape.
        scales: float32, as `weight_scale` shapes them.
        limit: Largest level.
    """
    result: Tensor = _LearnedWeight.apply(weight, probe, scales, limit)  # type: ignore[no-untyped-call]
    return result


class _LearnedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, probe: Tensor, scales: Tensor, limit: int) -> Tensor:
        ctx.limit = limit
        ctx.save_for_backward(weight, scales.clone())
        return rounded_weight(weight.detach(), scales, limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, scales = ctx.saved_tensors
        steps = (weight if weight.dtype == torch.float64 else weight.float()) / scales
        over, under = steps > ctx.limit, steps < -ctx.limit
        inner = torch.where(over, float(ctx.limit), torch.where(under, float(-ctx.limit), steps.round() - steps))
        factor = 1.0 / math.sqrt(max(1, weight.numel() // max(1, scales.numel())) * ctx.limit)
        probe = (grad.to(steps.dtype) * inner).sum_to_size(scales.shape).float() * factor
        return torch.where(over | under, torch.zeros_like(grad), grad), probe, None, None
