"""Fake-quantization by differentiable operations of PyTorch alone: for tracers, which record them, and for transforms (`vmap`, `jvp`, …), which know them.

What is rounded has no gradient; the gradient comes by way of a zero, ``y - y.detach()`` with y = x where it passes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_cco.compat.torch_modes import is_jit_tracing
from lightning_cco.quantization.qparams import INF, Bound, Grid, quant_range, weight_scale
from lightning_cco.quantization.tracing import without_gradient


def fake_quantize_openly(x: Tensor, scale: Bound, grid: Grid) -> Tensor:
    """By differentiable operations of PyTorch alone, which tracers record and transforms (`vmap`, `jvp`, …) know, any number of times over.

    What is rounded has no gradient; the gradient comes by way of a zero, ``y - y.detach()`` with y = x where it passes. Numbers instead of tensors where they
    are known: a fake tensor goes together with numbers, but not with a tensor that isn't.
    """
    values = without_gradient(x)
    levels = _times(values, _inverse(scale)).round()
    rounded = (_clamped(levels, grid.first, grid.last) * scale).to(x.dtype)
    if not _wants_gradient():
        return rounded
    inside = (levels >= grid.low) & (levels <= grid.high)
    for condition in where_clamp_passes(values, grid.limits):
        inside = inside & condition
    passing = torch.where(inside, x, torch.zeros_like(x))
    return rounded + (passing - without_gradient(passing))


def _wants_gradient() -> bool:
    # The compiler can't look into `is_jit_tracing`. The graph of a trace must be the same each time, and may be trained.
    if not torch.compiler.is_compiling() and is_jit_tracing():
        return not torch.onnx.is_in_onnx_export()
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _inverse(scale: Bound) -> Bound:
    return scale.reciprocal() if isinstance(scale, Tensor) else float(np.float32(1.0) / np.float32(scale))


def _times(x: Tensor, factor: Bound) -> Tensor:
    return (x if x.dtype in (torch.float32, torch.float64) else x.float()) * factor


def _clamped(levels: Tensor, first: Bound, last: Bound) -> Tensor:
    return levels.clamp(first, last)  # type: ignore[arg-type]


def fake_quantize_weight_openly(weight: Tensor, num_bits: int, axis: int | None, mse: bool) -> Tensor:
    """By differentiable operations alone, as `fake_quantize_openly`."""
    values, limit = without_gradient(weight), quant_range(num_bits, symmetric=True)[1]
    scale = weight_scale(values, num_bits, axis, mse)
    levels = _times(values, scale.reciprocal()).round()
    return straight_through(((levels.clamp(-limit, limit) if mse else levels) * scale).to(weight.dtype), weight)


def rounded_weight(weight: Tensor, scales: Tensor, limit: int) -> Tensor:
    """A weight on symmetric grids of given scales; clipped at the last levels."""
    steps = (weight if weight.dtype == torch.float64 else weight.float()) * scales.reciprocal()
    return (steps.round().clamp(-limit, limit) * scales).to(weight.dtype)


def straight_through(rounded: Tensor, weight: Tensor) -> Tensor:
    """A rounded tensor with the gradient of the identity, where one is wanted."""
    return rounded + (weight - without_gradient(weight)) if _wants_gradient() else rounded


def where_clamp_passes(x: Tensor, limits: tuple[float, float]) -> list[Tensor]:
    """Where an activation's clamp has a gradient, one condition for each end that it has."""
    below, above = limits
    return [condition for condition, end in ((x > below, below), (x < above, above)) if abs(end) != INF]
