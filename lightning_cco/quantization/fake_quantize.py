"""Fake-quantization: values rounded to the grid of an integer format, kept as floats, with straight-through gradients.

The grid of an affine tensor is ``(level - zero_point) * scale`` for the levels ``quant_min … quant_max``; that of a symmetric one is
``level * scale`` (Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018).

PyTorch's own operation is 20 to 30 times slower on a CPU than the memory allows. Here one pass over the memory does the same where `native` has kernels, and
a few in-place operations on one fresh buffer elsewhere; both with the same results to the last bit, gradients included.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_cco.compat.autograd import plain_apply
from lightning_cco.compat.torch_modes import is_jit_tracing
from lightning_cco.quantization import operations
from lightning_cco.quantization.gradient_holders import fewest_holders, holders
from lightning_cco.quantization.native import Kernels, kernels_for
from lightning_cco.quantization.tracing import behind_transforms, runs_plainly
from lightning_cco.quantization.weight_clipping import clip_ratios_of_weight
from lightning_cco.quantization.weight_recompute import RecomputedWeight

_SMALLEST_SCALE = 1e-12
_INF = float("inf")
_NO_LIMITS = (-_INF, _INF)

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
        return operations.weight_scale(weight, axis, limit, _SMALLEST_SCALE, mse)
    if axis is None:
        high, low = weight.amax(), weight.amin()
    else:
        # The axes behind the channels first: one reduction over axes on both sides of one that stays is many times slower.
        high = low = weight
        for dims in (tuple(range(axis + 1, weight.dim())), tuple(range(axis))):
            if dims:
                high, low = high.amax(dims, keepdim=True), low.amin(dims, keepdim=True)
    largest = torch.maximum(high, -low).float()
    scale = largest.div(limit)
    if mse:
        scale = scale * clip_ratios_of_weight(weight, largest, limit, axis, _SMALLEST_SCALE)
    return scale.clamp(min=_SMALLEST_SCALE)


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


def _grid(scale: Bound, zero_point: Bound, num_bits: int, symmetric: bool, limits: tuple[float, float]) -> Grid:
    quant_min, quant_max = quant_range(num_bits, symmetric)
    low, high = quant_min - zero_point, quant_max - zero_point
    return Grid(*level_bounds(scale, low, high, limits), low, high, limits)


_grid_of_numbers = functools.lru_cache(maxsize=4096)(_grid)


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
    limits = clamp if clamp is not None else _NO_LIMITS
    if numbers is None:
        grid, kernels = _grid(scale, zero_point, num_bits, symmetric, limits), None
    else:
        grid, kernels = _grid_of_numbers(*numbers, num_bits, symmetric, limits), kernels_for(x)
    openly = kernels is None and not torch.compiler.is_compiling() and not runs_plainly()
    if extrema is not None and kernels is None:
        _widen_openly(extrema, x, limits) if openly else widen(extrema, x.detach(), limits)
    if openly:
        rounded = _fake_quantize_openly(x, scale if numbers is None else numbers[0], grid)
        return x.copy_(rounded) if inplace else rounded
    if not (torch.is_grad_enabled() and x.requires_grad):
        if kernels is not None and numbers is not None:
            return _run(kernels, x, numbers[0], grid, inplace, None, extrema)
        return _scaled(x, _levels(x, scale, inplace).clamp_(grid.first, grid.last), scale, inplace)  # type: ignore[arg-type]
    result: Tensor
    if kernels is not None and numbers is not None:
        result = _by_kernel(x, kernels, numbers[0], grid, inplace, extrema)
    elif torch.compiler.is_compiling() and isinstance(grid.low, Tensor) and isinstance(grid.high, Tensor):
        result = _FakeQuantizeTraced.apply(x.clone() if inplace else x, scale, grid.low, grid.high, grid)  # type: ignore[no-untyped-call]
        if inplace:
            x.copy_(result)
            return x
    else:
        result = _FakeQuantize.apply(x, scale, grid, inplace)  # type: ignore[no-untyped-call]
    return result


def widen(extrema: Tensor, x: Tensor, clamp: tuple[float, float] | None = None) -> None:
    """Widen ``extrema``, float32 of 2, to the smallest and the largest value of ``x`` after a clamp."""
    if not x.numel():
        return
    limits = clamp if clamp is not None else _NO_LIMITS
    if operations.has_operations(x):
        extrema.copy_(operations.widened(extrema, x, limits))
        return
    ends = torch.stack(torch.aminmax(x)).float().clamp(*limits)
    extrema.copy_(torch.stack([torch.minimum(extrema[0], ends[0]), torch.maximum(extrema[1], ends[1])]))


def _widen_openly(extrema: Tensor, x: Tensor, limits: tuple[float, float]) -> None:
    with behind_transforms(x) as values:
        if values is not None:
            widen(extrema, values, limits)


def _fake_quantize_openly(x: Tensor, scale: Bound, grid: Grid) -> Tensor:
    """By differentiable operations of PyTorch alone, which tracers record and transforms (`vmap`, `jvp`, …) know, any number of times over.

    What is rounded has no gradient; the gradient comes by way of a zero, ``y - y.detach()`` with y = x where it passes. Numbers instead of tensors where they
    are known: a fake tensor goes together with numbers, but not with a tensor that isn't.
    """
    levels = _times(x.detach(), _inverse(scale)).round()
    rounded = (_clamped(levels, grid.first, grid.last) * scale).to(x.dtype)
    if not _wants_gradient():
        return rounded
    inside = (levels >= grid.low) & (levels <= grid.high)
    for condition in _active(x.detach(), grid.limits):
        inside = inside & condition
    passing = torch.where(inside, x, torch.zeros_like(x))
    return rounded + (passing - passing.detach())


def _wants_gradient() -> bool:
    if is_jit_tracing():  # the graph must be the same each time, and may be trained
        return not torch.onnx.is_in_onnx_export()
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _inverse(scale: Bound) -> Bound:
    return scale.reciprocal() if isinstance(scale, Tensor) else float(np.float32(1.0) / np.float32(scale))


def _times(x: Tensor, factor: Bound) -> Tensor:
    return (x if x.dtype in (torch.float32, torch.float64) else x.float()) * factor


def _clamped(levels: Tensor, first: Bound, last: Bound) -> Tensor:
    return levels.clamp(first, last)  # type: ignore[arg-type]


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
        active = _active(x, grid.limits)
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
        for condition in _active(x, ctx.limits):
            passes = passes * condition
        return grad * passes.to(grad.dtype), *(None,) * 4


def _active(x: Tensor, limits: tuple[float, float]) -> list[Tensor]:
    """Where an activation's clamp has a gradient, one condition for each end that it has."""
    below, above = limits
    return [condition for condition, end in ((x > below, below), (x < above, above)) if abs(end) != _INF]


class _FakeQuantizeByKernel(torch.autograd.Function):
    """In one pass, with the mask in one bit per value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Kernels, scale: float, grid: Grid, inplace: bool, extrema: Tensor | None) -> Tensor:
        mask = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)
        result = _run(kernels, x, scale, grid, inplace, mask, extrema)
        ctx.kernels, ctx.strides = kernels, x.stride()
        fewest_holders()
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(mask)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        if torch.is_grad_enabled() or kernels_for(grad) is None or grad.stride() != ctx.strides:
            return grad * _unpacked(mask, grad.shape, ctx.strides), *(None,) * 5
        own = fewest_holders()
        out = grad if own and holders(grad) in own else torch.empty_like(grad)
        ctx.kernels.mask_gradient(grad, out, mask)
        return out, *(None,) * 5


_by_kernel = plain_apply(_FakeQuantizeByKernel)  # kernels are only there where operations run plainly


def _run(kernels: Kernels, x: Tensor, scale: float, grid: Grid, inplace: bool, mask: Tensor | None, extrema: Tensor | None) -> Tensor:
    out = x if inplace else torch.empty_like(x)
    kernels.fake_quantize(x, out, scale, (grid.first, grid.last), (grid.low, grid.high), grid.limits, mask, extrema)  # type: ignore[arg-type]
    if inplace:
        torch.autograd.graph.increment_version(x)
    return out


def _unpacked(mask: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """The mask as bools in the shape and order of the values that it is of."""
    bits = mask.unsqueeze(1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=mask.device)).bitwise_and_(1).bool().flatten()
    return bits[: shape.numel()].as_strided(shape, strides)


def level_bounds(scale: Bound, low: Bound, high: Bound, limits: tuple[float, float]) -> tuple[Bound, Bound]:
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


def fake_quantize_weight(
    weight: Tensor, num_bits: int, axis: int | None, recomputed: RecomputedWeight | None = None, mse: bool = False
) -> Tensor:
    """Round a weight to the symmetric grid of its own scales. The gradient is that of the identity, also where ``mse`` scales clip.

    Args:
        weight: Any shape, any float type.
        num_bits: Bits of the format.
        axis: Axis of the output channels; `None`: one scale for all.
        recomputed: Takes the scales, and gives the memory for the result; only where there are kernels for the weight.
        mse: Which scales, as for `weight_scale`.
    """
    kernels = None
    if recomputed is not None:
        kernels = recomputed.kernels
    elif not torch.compiler.is_compiling():
        kernels = kernels_for(weight) if axis is not None and weight.is_contiguous() else None
        if kernels is None and not runs_plainly():
            return _fake_quantize_weight_openly(weight, num_bits, axis, mse)
    limit = quant_range(num_bits, symmetric=True)[1]
    result: Tensor
    if kernels is None:
        result = _FakeQuantizeWeight.apply(weight, num_bits, limit, axis, mse)  # type: ignore[no-untyped-call]
    elif weight.requires_grad and torch.is_grad_enabled():
        result = _with_identity_gradient(weight, kernels, limit, axis, recomputed, mse)
    else:
        result = _weight_by_kernel(weight, kernels, limit, axis, recomputed, mse)
    return result


def _fake_quantize_weight_openly(weight: Tensor, num_bits: int, axis: int | None, mse: bool) -> Tensor:
    """By differentiable operations alone, as `_fake_quantize_openly`."""
    scale, limit = weight_scale(weight, num_bits, axis, mse), quant_range(num_bits, symmetric=True)[1]
    levels = _times(weight.detach(), scale.reciprocal()).round()
    rounded = ((levels.clamp(-limit, limit) if mse else levels) * scale).to(weight.dtype)
    return rounded + (weight - weight.detach()) if _wants_gradient() else rounded


def _weight_by_kernel(
    weight: Tensor, kernels: Kernels, limit: int, axis: int | None, recomputed: RecomputedWeight | None, mse: bool
) -> Tensor:
    assert axis is not None
    scales = None
    if recomputed is None:
        result = torch.empty_like(weight, requires_grad=False)
    else:
        scales, recomputed.limit, result = recomputed.scales, limit, recomputed.room()
    kernels.fake_quantize_weight(weight, result, axis, limit, _SMALLEST_SCALE, scales, mse=mse)
    return result


class _FakeQuantizeWeightByKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, *args: Any) -> Tensor:
        return _weight_by_kernel(weight, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, *(None,) * 5


_with_identity_gradient = plain_apply(_FakeQuantizeWeightByKernel)


class _FakeQuantizeWeight(torch.autograd.Function):
    """By torch operations."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, num_bits: int, limit: int, axis: int | None, mse: bool) -> Tensor:
        scale = weight_scale(weight, num_bits, axis, mse)
        inverse = scale.reciprocal()
        plain = weight.dtype in (torch.float32, torch.float64)
        levels = weight.mul(inverse).round_() if plain else weight.float().mul_(inverse).round_()
        if mse:
            levels = levels.clamp_(-limit, limit)
        return levels.mul_(scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, *(None,) * 4
