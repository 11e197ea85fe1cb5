"""Fake-quantization of weights: symmetric, with scales worked out anew from the weight, and the gradient of the identity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from lightning_cco.compat.autograd import plain_apply
from lightning_cco.quantization.differentiable_operations import fake_quantize_weight_openly
from lightning_cco.quantization.native import Kernels
from lightning_cco.quantization.qparams import SMALLEST_SCALE, quant_range, weight_scale
from lightning_cco.quantization.small_tensors import round_small_weight
from lightning_cco.quantization.tracing import runs_plainly
from lightning_cco.quantization.triton_calls import TritonKernels, fitting_kernels
from lightning_cco.quantization.weight_recompute import RecomputedWeight


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
        kernels = None if axis is None else fitting_kernels(weight)
        if kernels is None and not runs_plainly():
            return fake_quantize_weight_openly(weight, num_bits, axis, mse)
    limit = quant_range(num_bits, symmetric=True)[1]
    result: Tensor
    if kernels is None:
        result = _FakeQuantizeWeight.apply(weight, num_bits, limit, axis, mse)  # type: ignore[no-untyped-call]
    elif weight.requires_grad and is_grad_enabled():
        result = _with_identity_gradient(weight, kernels, limit, axis, recomputed, mse)
    else:
        result = _weight_by_kernel(weight, kernels, limit, axis, recomputed, mse)
    return result


def fake_quantize_small_weight(weight: Tensor, num_bits: int, axis: int | None, mse: bool) -> Tensor | None:
    """The same for a small weight that has a gradient, in eager training, in the fewest steps; `None` where there is no such way."""
    if axis is None or not is_grad_enabled():
        return None
    kernels = fitting_kernels(weight)
    return None if kernels is None else round_small_weight(weight, kernels, axis, 2 ** (num_bits - 1) - 1, SMALLEST_SCALE, mse)


def _weight_by_kernel(
    weight: Tensor, kernels: Kernels | TritonKernels, limit: int, axis: int | None, recomputed: RecomputedWeight | None, mse: bool
) -> Tensor:
    assert axis is not None
    scales = None
    if recomputed is None:
        result = torch.empty_like(weight, requires_grad=False)
    else:
        scales, recomputed.limit, result = recomputed.scales, limit, recomputed.room()
    kernels.fake_quantize_weight(weight, result, axis, limit, SMALLEST_SCALE, scales, mse=mse)
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
