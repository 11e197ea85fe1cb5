"""Fake-quantization of weights on affine grids, with a scale and a zero point for each row: pure functions, by kernels or by torch operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_cco.quantization import operations
from lightning_cco.quantization.differentiable_operations import straight_through
from lightning_cco.quantization.native import Kernels, kernels_for
from lightning_cco.quantization.qparams import SMALLEST_SCALE, smallest_scale
from lightning_cco.quantization.tracing import runs_plainly, without_gradient
from lightning_cco.quantization.weight_clipping import best_affine_ratios
from lightning_cco.quantization.weight_recompute import RecomputedWeight


def affine_weight_qparams(rows: Tensor, num_bits: int, mse: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and level of 0 of each row, whose range is widened to contain 0.

    With ``mse`` both ends of the range are shrunk by the one of 1/48, 2/48, … 1 at which rounding and clipping together lose least (as Frantar et al., "GPTQ",
    2022, search it); the level of 0 stays, so that a weight of 0 is 0.

    Args:
        rows: (rows, values of each), any float type.
        num_bits: Bits of the format: its levels are 0 to ``2 ** num_bits - 1``.
        mse: Which scales.

    Returns:
        Two float32 of (rows, 1); the second one is a whole number.

    >>> affine_weight_qparams(torch.tensor([[-1.0, 14.0]]), 4)
    (tensor([[1.]]), tensor([[1.]]))
    """
    rows, last = rows.detach(), 2**num_bits - 1
    if operations.has_operations(rows):
        scale, zero = operations.affine_weight_scale(rows, last, smallest_scale(), mse).unsqueeze(-1)
        return scale, zero
    kernels = kernels_for(rows) if mse and not torch.compiler.is_compiling() and rows.is_contiguous() else None
    if kernels is not None:
        qparams = torch.empty(2, len(rows), dtype=torch.float32, device="cpu")
        kernels.affine_weight_scale(rows, last, SMALLEST_SCALE, qparams, mse)
        scale, zero = qparams.unsqueeze(-1)
        return scale, zero
    low, high = rows.amin(1, keepdim=True).float().clamp(max=0.0), rows.amax(1, keepdim=True).float().clamp(min=0.0)
    span = high - low
    scale = span.div(last)
    zero = (-low / scale.clamp(min=smallest_scale())).round().clamp(max=last)
    if mse:
        scale = scale * best_affine_ratios(rows, span, zero, last, smallest_scale())
    return scale.clamp(min=smallest_scale()), zero


def fake_quantize_affine_rows(rows: Tensor, num_bits: int, recomputed: RecomputedWeight | None = None, mse: bool = False) -> Tensor:
    """Round each row of a matrix to an affine grid of its own. The gradient is that of the identity.

    Args:
        rows: (rows, values of each), any float type.
        num_bits: Bits of the format.
        recomputed: Takes scales and zero points, and gives the memory for the result; only where there are kernels for the rows.
        mse: Which scales, as for `affine_weight_qparams`.
    """
    if not torch.compiler.is_compiling():
        if not runs_plainly():
            return straight_through(_by_torch(without_gradient(rows), num_bits, mse), rows)
        kernels = recomputed.kernels if recomputed is not None else kernels_for(rows)
        if isinstance(kernels, Kernels) and rows.is_contiguous():
            rounded: Tensor = _RoundByKernel.apply(rows, kernels, 2**num_bits - 1, recomputed, mse)  # type: ignore[no-untyped-call]
            return rounded
    result: Tensor = _Round.apply(rows, num_bits, mse)  # type: ignore[no-untyped-call]
    return result


def _by_torch(rows: Tensor, num_bits: int, mse: bool) -> Tensor:
    scale, zero = affine_weight_qparams(rows, num_bits, mse)
    values = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    levels = torch.minimum(torch.maximum((values * scale.reciprocal()).round(), -zero), 2**num_bits - 1 - zero)
    return (levels * scale).to(rows.dtype)


class _Round(torch.autograd.Function):
    """By torch operations."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, num_bits: int, mse: bool) -> Tensor:
        return _by_torch(rows, num_bits, mse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, None


class _RoundByKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, kernels: Kernels, last: int, recomputed: RecomputedWeight | None, mse: bool) -> Tensor:
        if recomputed is None:
            qparams = torch.empty(2, len(rows), dtype=torch.float32, device="cpu")
            result = torch.empty_like(rows, requires_grad=False)
        else:
            qparams, recomputed.limit, result = recomputed.scales, last, recomputed.room()
        kernels.fake_quantize_affine_weight(rows, result, last, SMALLEST_SCALE, qparams, mse=mse)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None, None, None, None
