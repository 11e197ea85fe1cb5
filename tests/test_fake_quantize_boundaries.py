"""Fake-quantization at the values where it may go wrong: ends of the range, exact levels, ties between two, both zeros; for all bits and types."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_cco.quantization.fake_quantize import fake_quantize
from lightning_cco.quantization.qparams import quant_range
from lightning_cco.quantization.weight_fake_quantize import fake_quantize_weight

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def boundary_values(scale: float, zero_point: int, num_bits: int, dtype: torch.dtype) -> Tensor:
    """Levels, ties between levels, both ends and half a step and a step beyond: those that the type can hold."""
    low, high = quant_range(num_bits, symmetric=False)
    steps = torch.arange(low - zero_point, high - zero_point + 1, dtype=torch.float64)
    beyond = torch.tensor([steps[0] - 1, steps[0] - 0.5, steps[-1] + 0.5, steps[-1] + 1, 0.0, -0.0])
    values = torch.cat([steps, steps + 0.5, beyond]) * scale
    return values[values.to(dtype).double() == values].to(dtype)


@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0], ids=["positive", "both", "negative"])
@pytest.mark.parametrize("known", [True, False], ids=["kernels", "operations"])
def test_activations_are_torchs_to_the_bit(num_bits: int, dtype: torch.dtype, share: float, known: bool) -> None:
    low, high = quant_range(num_bits, symmetric=False)
    scale, zero_point = 0.125, round(low + share * (high - low))  # a power of two, so that ties are ties in each formula
    x = boundary_values(scale, zero_point, num_bits, dtype)
    ours, theirs = x.clone().requires_grad_(), x.float().requires_grad_()
    numbers = (scale, float(zero_point)) if known else None
    y = fake_quantize(ours, torch.tensor(scale), torch.tensor(float(zero_point)), num_bits, numbers=numbers)
    expected = torch.fake_quantize_per_tensor_affine(theirs, scale, zero_point, low, high)
    assert y.dtype == dtype
    assert torch.equal(y.float(), expected)
    y.backward(torch.ones_like(y))
    expected.backward(torch.ones_like(expected))
    assert torch.equal(ours.grad.float(), theirs.grad)


@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_weights_are_torchs_to_the_bit(num_bits: int, dtype: torch.dtype, axis: int) -> None:
    limit = quant_range(num_bits, symmetric=True)[1]
    levels = torch.arange(-limit, limit + 1, dtype=torch.float64)
    ties = torch.cat([levels, levels[:-1] + 0.5, torch.tensor([0.0, -0.0])])
    w = torch.stack([ties * scale for scale in (0.125, 2.0, 0.5)])  # a channel each; its largest value is limit times a power of two
    w = (w if axis == 0 else w.T).to(dtype)
    scales = w.float().abs().amax(1 - axis) / limit
    ours, theirs = w.clone().requires_grad_(), w.float().requires_grad_()
    y = fake_quantize_weight(ours, num_bits, axis)
    expected = torch.fake_quantize_per_channel_affine(theirs, scales, torch.zeros_like(scales), axis, -limit, limit)
    assert torch.equal(y.float(), expected)
    y.backward(torch.ones_like(y))
    expected.backward(torch.ones_like(expected))
    assert torch.equal(ours.grad.float(), theirs.grad)
