"""The scale of a weight at which rounding and clipping together lose least, by torch operations; `kernels.c` has the same in one pass.

At few bits a scale from the largest magnitude is too coarse for all the other weights: of 2 bits it rounds four fifths of them to 0. A smaller one clips a few
and rounds the rest more finely (Sung et al., "Resiliency of Deep Neural Networks under Quantization", 2015).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RATIOS = 48
"""How many parts of the largest magnitude's scale are tried: 1/48, 2/48, … 1."""
_MOST_AT_ONCE = 1 << 22  # values
_FINENESS = 7  # for 2 bits a magnitude counts in 48 * 7 whole numbers: finer ones find no better scale


def clip_ratios_of_weight(weight: Tensor, largest: Tensor, limit: int, axis: int | None, smallest_scale: float) -> Tensor:
    """The part of each channel's scale at which the sum of squared errors is least; of equal ones the largest.

    Magnitudes count in whole numbers, so that sums are exact in any order: the choice is the same by kernels, by torch and in a compiled graph.

    Args:
        weight: Any shape, any float type.
        largest: Largest magnitude of each channel, float32 as `weight_scale` shapes it.
        limit: Largest level.
        axis: Axis of the channels; `None`: one for all.
        smallest_scale: Scales that are not greater are left alone, like those that are not finite.

    Returns:
        float32 in (0, 1], in the shape of ``largest``.
    """
    unit = max(1, _FINENESS // limit)
    most = limit * RATIOS * unit
    scale = largest.div(limit)
    counted = torch.isfinite(scale) & (scale > smallest_scale)
    inverse = torch.where(counted, largest.reciprocal().mul(most), torch.zeros_like(largest))
    whole = (weight.float().abs() * inverse).round().clamp(max=most)
    whole = whole.reshape(1, -1) if axis is None else whole.movedim(axis, 0).unsqueeze(-1).flatten(1)
    ratio = _best_ratios(whole, unit, lambda levels: levels.clamp(max=limit)).reshape(largest.shape)
    return torch.where(counted, ratio, torch.ones_like(ratio))


def best_affine_ratios(rows: Tensor, span: Tensor, zero: Tensor, last: int, smallest_scale: float) -> Tensor:
    """The same for rows of weights on affine grids: the part of each row's range at which the sum of squared errors is least, with the same level of 0.

    Args:
        rows: (rows, values of each), any float type.
        span: Width of each row's range, which contains 0; float32, (rows, 1).
        zero: The level of 0; float32, (rows, 1).
        last: Last level; the first one is 0.
        smallest_scale: Scales that are not greater are left alone, like those that are not finite.

    Returns:
        float32 in (0, 1], (rows, 1).
    """
    unit = max(1, 2 * _FINENESS // last)
    scale = span.div(last)
    counted = torch.isfinite(scale) & (scale > smallest_scale)
    inverse = torch.where(counted, span.reciprocal().mul(last * RATIOS * unit), torch.zeros_like(span))
    whole = (rows.float() * inverse).round()
    ratio = _best_ratios(whole, unit, lambda levels: torch.minimum(torch.maximum(levels, -zero), last - zero)).unsqueeze(-1)
    return torch.where(counted, ratio, torch.ones_like(ratio))


def _best_ratios(whole: Tensor, unit: int, clipped: Callable[[Tensor], Tensor]) -> Tensor:
    """The best ratio of each row of values that count in whole numbers; ``clipped`` gives levels within the format."""
    at_once = RATIOS if torch.compiler.is_compiling() else max(1, min(RATIOS, _MOST_AT_ONCE // max(1, whole.numel())))
    found = []
    for start in range(0, RATIOS, at_once):
        number = torch.arange(start, min(start + at_once, RATIOS), device=whole.device)  # from the largest ratio on
        steps = ((RATIOS - number) * unit).float().reshape(-1, 1, 1)
        errors = (whole - clipped((whole * steps.reciprocal()).round()) * steps).int()
        # One number tells the error and, of equal ones, the ratio.
        found.append((errors.square().sum(-1, dtype=torch.int64) * RATIOS + number.reshape(-1, 1)).amin(0))
    best = torch.stack(found).amin(0).remainder(RATIOS)
    return (RATIOS - best).float().div(RATIOS)
