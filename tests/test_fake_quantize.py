"""Fake-quantization equals torch's own operations, forward and backward, except where it differs on purpose."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_cco.quantization.fake_quantize import affine_qparams, fake_quantize, fake_quantize_weight, quant_range, weight_scale

BITS = range(2, 9)


def with_gradient(function: object, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.backward(grad)
    return y.detach(), x.grad


def off_the_outermost_levels(y: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int) -> Tensor:
    low, high = quant_range(num_bits, symmetric=False)
    level = (y / scale).round() + zero_point
    return (level > low) & (level < high)


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("as_number", [True, False], ids=["number", "tensor"])
def test_affine_forward_and_gradient_are_torchs(num_bits: int, as_number: bool) -> None:
    x, grad = torch.randn(4, 50, 7) * 3, torch.randn(4, 50, 7)
    # A range narrower than the values, so that some are clipped.
    scale, zero_point = affine_qparams(torch.tensor(-2.0), torch.tensor(3.0), num_bits)
    numbers = (float(scale), float(zero_point)) if as_number else None
    low, high = quant_range(num_bits, symmetric=False)
    y, dx = with_gradient(lambda t: fake_quantize(t, scale, zero_point, num_bits, numbers=numbers), x, grad)
    expected, expected_dx = with_gradient(
        lambda t: torch.fake_quantize_per_tensor_affine(t, float(scale), int(zero_point), low, high), x, grad
    )
    torch.testing.assert_close(y, expected)
    same = dx == expected_dx
    if num_bits < 7:
        assert same.all()
    else:
        # On purpose: from 7 bits on what lands on the outermost level counts as clipped, whether rounding or clipping put it there.
        assert same[off_the_outermost_levels(y, scale, zero_point, num_bits)].all()
        assert (dx[~same] == 0).all()
        assert same.float().mean() > 0.95


@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    ends=st.tuples(st.floats(-1e3, 1e3, width=32), st.floats(-1e3, 1e3, width=32)),
    num_bits=st.sampled_from(BITS),
)
@settings(max_examples=200, deadline=None)
def test_any_values_and_range(values: list[float], ends: tuple[float, float], num_bits: int) -> None:
    x = torch.tensor(values)
    scale, zero_point = affine_qparams(torch.tensor(min(ends)), torch.tensor(max(ends)), num_bits)
    low, high = quant_range(num_bits, symmetric=False)
    assert float(zero_point) == int(zero_point)
    assert low <= int(zero_point) <= high
    y = fake_quantize(x, scale, zero_point, num_bits)
    expected = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), low, high)
    # x / scale and x * (1 / scale) may fall on two sides of a tie; then the results are one step apart.
    assert ((y - expected).abs() <= float(scale) * 1.001).all()
    away_from_ties = ((x / scale) % 1 - 0.5).abs() > 1e-3
    torch.testing.assert_close(y[away_from_ties], expected[away_from_ties], rtol=1e-5, atol=1e-5)
    assert (fake_quantize(torch.zeros(3), scale, zero_point, num_bits) == 0).all()


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_rounded_in_float32(num_bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(100).to(dtype)
    scale, zero_point = affine_qparams(torch.tensor(-1.5), torch.tensor(2.0), num_bits)
    y = fake_quantize(x, scale, zero_point, num_bits)
    assert y.dtype == dtype
    torch.testing.assert_close(y, fake_quantize(x.float(), scale, zero_point, num_bits).to(dtype))


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize(
    ("limits", "activation"),
    [
        pytest.param((0.0, float("inf")), F.relu, id="relu"),
        pytest.param((0.0, 6.0), F.relu6, id="relu6"),
        pytest.param((-1.0, 1.0), F.hardtanh, id="hardtanh"),
    ],
)
@pytest.mark.parametrize("as_number", [True, False], ids=["number", "tensor"])
def test_a_folded_activation_is_the_activation_then_the_rounding(
    num_bits: int, limits: tuple[float, float], activation: object, as_number: bool
) -> None:
    x, grad = torch.randn(500) * 4, torch.randn(500)
    scale, zero_point = affine_qparams(torch.tensor(-1.0), torch.tensor(5.0), num_bits)
    numbers = (float(scale), float(zero_point)) if as_number else None
    y, dx = with_gradient(lambda t: fake_quantize(t, scale, zero_point, num_bits, clamp=limits, numbers=numbers), x, grad)
    low, high = quant_range(num_bits, symmetric=False)

    def apart(t: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(activation(t), float(scale), int(zero_point), low, high)

    expected, expected_dx = with_gradient(apart, x, grad)
    torch.testing.assert_close(y, expected)
    differs = dx != expected_dx
    if num_bits < 7:
        assert not differs.any()
    else:
        # On purpose: what lands on the ends of the folded interval has no gradient.
        ends = (y == y.min()) | (y == y.max())
        assert (differs & ~ends).sum() == 0
        assert (dx[differs] == 0).all()


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_is_the_same_in_the_same_memory(num_bits: int, dtype: torch.dtype) -> None:
    x, grad = torch.randn(300).to(dtype), torch.randn(300).to(dtype)
    scale, zero_point = affine_qparams(torch.tensor(-1.0), torch.tensor(1.0), num_bits)
    expected, expected_dx = with_gradient(
        lambda t: fake_quantize(t, scale, torch.tensor(0.0), num_bits, clamp=(0.0, float("inf"))), x, grad
    )

    def in_place(t: Tensor) -> Tensor:
        buffer = t * 1.0
        result = fake_quantize(buffer, scale, torch.tensor(0.0), num_bits, clamp=(0.0, float("inf")), inplace=True)
        assert result.data_ptr() == buffer.data_ptr()
        return result

    y, dx = with_gradient(in_place, x, grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, expected_dx)
    del zero_point


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((6, 3, 3, 3), 0), ((6, 4, 3, 3), 1), ((5, 7), 0), ((5, 7), 1), ((9,), 0)],
    ids=["conv", "conv_transpose", "linear", "matmul", "vector"],
)
def test_weights_are_torchs_per_channel_operation(num_bits: int, shape: tuple[int, ...], axis: int) -> None:
    w, grad = torch.randn(shape), torch.randn(shape)
    scale = weight_scale(w, num_bits, axis).flatten()
    limit = quant_range(num_bits, symmetric=True)[1]
    y, dw = with_gradient(lambda t: fake_quantize_weight(t, num_bits, axis), w, grad)
    zero = torch.zeros_like(scale)
    expected, expected_dw = with_gradient(lambda t: torch.fake_quantize_per_channel_affine(t, scale, zero, axis, -limit, limit), w, grad)
    torch.testing.assert_close(y, expected)
    assert torch.equal(dw, expected_dw)  # nothing clips, so torch's gradient is the identity too


def test_a_whole_tensor_weight_and_a_dead_channel() -> None:
    w = torch.randn(4, 5)
    w[1] = 0
    y = fake_quantize_weight(w, 8, 0)
    assert (y[1] == 0).all()
    assert torch.isfinite(y).all()
    scale = float(weight_scale(w, 8, None))
    torch.testing.assert_close(fake_quantize_weight(w, 8, None), torch.fake_quantize_per_tensor_affine(w, scale, 0, -127, 127))


def test_symmetric_activations() -> None:
    x = torch.randn(200)
    scale, zero_point = affine_qparams(torch.tensor(-1.0), torch.tensor(2.0), 8, symmetric=True)
    assert float(zero_point) == 0.0
    torch.testing.assert_close(float(scale), 2.0 / 127)
    torch.testing.assert_close(
        fake_quantize(x, scale, torch.tensor(0.0), 8, symmetric=True), torch.fake_quantize_per_tensor_affine(x, float(scale), 0, -127, 127)
    )


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0, 4)])
def test_empty_and_zero_dimensional(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    scale, zero_point = affine_qparams(torch.tensor(0.0), torch.tensor(1.0), 8)
    assert fake_quantize(x, scale, zero_point, 8).shape == x.shape


def test_memory_format_is_kept() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    scale, zero_point = affine_qparams(torch.tensor(-1.0), torch.tensor(1.0), 8)
    assert fake_quantize(x, scale, zero_point, 8).is_contiguous(memory_format=torch.channels_last)
    assert fake_quantize_weight(x, 8, 0).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("as_number", [True, False], ids=["number", "tensor"])
@pytest.mark.parametrize("num_bits", BITS)
def test_kept_apart_the_gradient_survives_an_overwritten_result(num_bits: int, as_number: bool, inplace: bool) -> None:
    x, grad = torch.randn(500), torch.randn(500)
    scale, zero_point = affine_qparams(torch.tensor(-1.0), torch.tensor(1.5), num_bits)
    numbers = (float(scale), float(zero_point)) if as_number else None
    expected, expected_dx = with_gradient(lambda t: fake_quantize(t, scale, zero_point, num_bits, numbers=numbers), x, grad)

    def overwritten(t: Tensor) -> Tensor:
        y = fake_quantize(t * 1.0, scale, zero_point, num_bits, inplace=inplace, apart=True, numbers=numbers)
        y += 1.0
        return y

    y, dx = with_gradient(overwritten, x, grad)
    torch.testing.assert_close(y, expected + 1.0)
    assert torch.equal(dx, expected_dx)


def test_an_overwritten_result_that_the_gradient_is_read_off_is_an_error() -> None:
    x = torch.randn(50, requires_grad=True)
    y = fake_quantize(x, torch.tensor(0.1), torch.tensor(9.0), 8)
    y += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
