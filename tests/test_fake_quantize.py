"""Fake-quantization equals torch's own operations, forward and backward, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradients import with_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_off import turn_kernels_off
from torch import Tensor

from lightning_cco.quantization import native
from lightning_cco.quantization.fake_quantize import fake_quantize
from lightning_cco.quantization.qparams import affine_qparams, quant_range, weight_scale
from lightning_cco.quantization.weight_fake_quantize import fake_quantize_weight

BITS = range(2, 9)


@pytest.fixture(params=["kernels", "operations", "tensors"])
def numbers_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor, Tensor], tuple[float, float] | None]:
    """Each way of computing: the compiled kernels; torch operations with scale and zero point as numbers; the same with tensors, as compilers trace it."""
    if request.param == "kernels":
        if native.load() is None:
            pytest.skip("there is no C compiler")
    else:
        turn_kernels_off(monkeypatch)
    return lambda scale, zero_point: None if request.param == "tensors" else (float(scale), float(zero_point))


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("shape", [(4, 50, 7), (3, 700), (5,)], ids=str)
def test_affine_forward_and_gradient_are_torchs(num_bits: int, shape: tuple[int, ...], numbers_of: Any) -> None:
    x, grad = torch.randn(shape) * 3, torch.randn(shape)
    # A range narrower than the values, so that some are clipped.
    scale, zero_point = affine_qparams(torch.tensor(-2.0), torch.tensor(3.0), num_bits)
    numbers = numbers_of(scale, zero_point)
    low, high = quant_range(num_bits, symmetric=False)
    y, dx = with_gradient(lambda t: fake_quantize(t, scale, zero_point, num_bits, numbers=numbers), x, grad)
    expected, expected_dx = with_gradient(
        lambda t: torch.fake_quantize_per_tensor_affine(t, float(scale), int(zero_point), low, high), x, grad
    )
    torch.testing.assert_close(y, expected)
    assert torch.equal(dx, expected_dx)


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
def test_a_folded_activation_is_the_activation_then_the_rounding(
    num_bits: int, limits: tuple[float, float], activation: object, numbers_of: Any
) -> None:
    x, grad = torch.randn(3000) * 4, torch.randn(3000)
    scale, zero_point = affine_qparams(torch.tensor(-1.0), torch.tensor(5.0), num_bits)
    numbers = numbers_of(scale, zero_point)
    y, dx = with_gradient(lambda t: fake_quantize(t, scale, zero_point, num_bits, clamp=limits, numbers=numbers), x, grad)
    low, high = quant_range(num_bits, symmetric=False)

    def apart(t: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(activation(t), float(scale), int(zero_point), low, high)

    expected, expected_dx = with_gradient(apart, x, grad)
    torch.testing.assert_close(y, expected)
    assert torch.equal(dx, expected_dx)


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_is_the_same_in_the_same_memory(num_bits: int, dtype: torch.dtype, numbers_of: Any) -> None:
    x, grad = torch.randn(300).to(dtype), torch.randn(300).to(dtype)
    scale, zero_point = affine_qparams(torch.tensor(-1.0), torch.tensor(1.0), num_bits)
    how = {"clamp": (0.0, float("inf")), "numbers": numbers_of(scale, zero_point)}
    expected, expected_dx = with_gradient(lambda t: fake_quantize(t, scale, zero_point, num_bits, **how), x, grad)

    def in_place(t: Tensor) -> Tensor:
        buffer = t * 1.0
        result = fake_quantize(buffer, scale, zero_point, num_bits, inplace=True, **how)
        assert result.data_ptr() == buffer.data_ptr()
        return result

    y, dx = with_gradient(in_place, x, grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, expected_dx)


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
def test_the_gradient_survives_an_overwritten_result(inplace: bool, numbers_of: Any) -> None:
    x, grad = torch.randn(500), torch.randn(500)
    scale, zero_point = affine_qparams(torch.tensor(-1.0), torch.tensor(1.5), 8)
    numbers = numbers_of(scale, zero_point)
    expected, expected_dx = with_gradient(lambda t: fake_quantize(t, scale, zero_point, 8, numbers=numbers), x, grad)

    def overwritten(t: Tensor) -> Tensor:
        y = fake_quantize(t * 1.0, scale, zero_point, 8, inplace=inplace, numbers=numbers)
        y += 1.0
        return y

    y, dx = with_gradient(overwritten, x, grad)
    torch.testing.assert_close(y, expected + 1.0)
    assert torch.equal(dx, expected_dx)


def test_overwriting_what_another_operation_has_kept_is_an_error(numbers_of: Any) -> None:
    x, scale, zero_point = torch.randn(50, requires_grad=True), torch.tensor(0.1), torch.tensor(9.0)
    kept = x * 1.0
    loss = kept.square().sum()
    fake_quantize(kept, scale, zero_point, 8, inplace=True, numbers=numbers_of(scale, zero_point))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("clamp", [None, (0.0, 6.0)], ids=str)
def test_extrema_widen_to_the_values_after_the_clamp(clamp: tuple[float, float] | None, numbers_of: Any) -> None:
    x, scale, zero_point = torch.randn(4, 333) * 4, torch.tensor(0.1), torch.tensor(9.0)
    extrema = torch.tensor([-0.5, 0.5])
    for part in x:
        fake_quantize(part, scale, zero_point, 8, clamp=clamp, numbers=numbers_of(scale, zero_point), extrema=extrema)
    values = torch.cat([(x if clamp is None else x.clamp(*clamp)).flatten(), torch.tensor([-0.5, 0.5])])
    assert extrema.tolist() == [float(values.min()), float(values.max())]


def test_second_derivatives(numbers_of: Any) -> None:
    x, scale, zero_point = torch.randn(40, requires_grad=True), torch.tensor(0.01), torch.tensor(128.0)
    (dx,) = torch.autograd.grad(
        fake_quantize(x, scale, zero_point, 8, numbers=numbers_of(scale, zero_point)).pow(3).sum(), x, create_graph=True
    )
    (second,) = torch.autograd.grad(dx.sum(), x)
    y = fake_quantize(x.detach(), scale, zero_point, 8)
    inside = torch.ops.aten.fake_quantize_per_tensor_affine_cachemask(x.detach(), 0.01, 128, 0, 255)[1]
    torch.testing.assert_close(second, 6 * y * inside)
