"""Quantization parameters: the levels of a format, the scale and zero point of a range, the scales of a weight."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_cco.quantization import operations
from lightning_cco.quantization.native import kernels_for
from lightning_cco.quantization.weight_clipping import clip_ratios_of_weight


def smallest_scale() -> float:
    """The least scale.

    A function, for code that is compiled: ``torch.compile(dynamic=True)`` takes a global number for an input of its graph, which functions of autograd can't
    read.
    """
    return 1e-12


SMALLEST_SCALE = smallest_scale()
INF = float("inf")
NO_LIMITS = (-INF, INF)

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
    scale = torch.where(span > 0, span, torch.ones_like(span)).div(quant_max - quant_min).clamp(min=smallest_scale())
    zero_point = torch.zeros_like(scale) if symmetric else (quant_min - low / scale).round().clamp(quant_min, quant_max)
    return scale, zero_point


def weight_scale(weight: Tensor, num_bits: int, axis: int | None, mse: bool = False) -> Tensor:
    """Symmetric scale of each channel, or of the whole tensor.

    Args:
        weight: Any shape.
        num_bits: Bits of the format.
        axis: Axis of the output channels; `None`: one scale.
        mse: Whether the scale is that at which rounding and clipping together lose least, instead of that of the largest magnitude.

    Returns:
        float32 of the weight's number of dimensions, size 1 except along ``axis``; 0-d without an axis.
    """
    weight = weight.detach()
    limit = quant_range(num_bits, symmetric=True)[1]
    if axis is not None and operations.has_operations(weight):
        return operations.weight_scale(weight, axis, limit, smallest_scale(), mse)
    kernels = kernels_for(weight) if mse and axis is not None and not torch.compiler.is_compiling() else None
    if kernels is not None and axis is not None:
        scales = torch.empty(weight.shape[axis], dtype=torch.float32, device="cpu")
        kernels.weight_scale(weight, axis, limit, SMALLEST_SCALE, scales, mse)
        return scales.view([-1 if dim == axis else 1 for dim in range(weight.dim())])
    if axis is None:
        high, low = weight.amax(), weight.amin()
    else:
        # The axes after the channels first: one reduction over axes on both sides of one that stays is many times slower.
        high = low = weight
        for dims in (tuple(range(axis + 1, weight.dim())), tuple(range(axis))):
            if dims:
                high, low = high.amax(dims, keepdim=True), low.amin(dims, keepdim=True)
    largest = torch.maximum(high, -low).float()
    scale = largest.div(limit)
    if mse:
        scale = scale * clip_ratios_of_weight(weight, largest, limit, axis, smallest_scale())
    return scale.clamp(min=smallest_scale())


class Grid(NamedTuple):
    """The levels of a format with its zero point taken off, and where values have a gradient.

    Attributes:
        first: First level that is used, given the activation's clamp.
        last: Last level that is used.
        low: First level of the format.
        high: Last level of the format.
        limits: The activation's clamp.
    """

    first: Bound
    last: Bound
    low: Bound
    high: Bound
    limits: tuple[float, float]


def grid_of(scale: Bound, zero_point: Bound, num_bits: int, symmetric: bool, limits: tuple[float, float]) -> Grid:
    """The grid of a format, for tensors or for numbers; ``limits``: the activation's clamp."""
    quant_min, quant_max = quant_range(num_bits, symmetric)
    low, high = quant_min - zero_point, quant_max - zero_point
    return Grid(*level_bounds(scale, low, high, limits), low, high, limits)


grid_of_numbers = functools.lru_cache(maxsize=4096)(grid_of)


def level_bounds(scale: Bound, low: Bound, high: Bound, limits: tuple[float, float]) -> tuple[Bound, Bound]:
    """First and last level once the clamp of the activation is taken into account: rounding is monotone, so it may come after."""
    below, above = limits
    if isinstance(scale, Tensor):
        first = low if below == -INF else torch.maximum(low, (below * scale.reciprocal()).round())  # type: ignore[arg-type]
        last = high if above == INF else torch.minimum(high, (above * scale.reciprocal()).round())  # type: ignore[arg-type]
        return first, last
    if below == 0.0:
        low = max(low, 0.0)
    elif below != -INF:
        low = max(low, _level(below, scale))
    return low, high if above == INF else min(high, _level(above, scale))


def _level(value: float, scale: float) -> float:
    """Nearest level, by float32 arithmetic as for the values themselves: both must fall on the same side of a tie."""
    return float(np.rint(np.float32(value) * (np.float32(1.0) / np.float32(scale))))
