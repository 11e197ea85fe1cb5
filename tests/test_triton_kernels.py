"""Triton's kernels give what the kernels in C and the torch operations give, to the last bit; see `triton_here` for where they run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import with_gradient
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernels_off import turn_kernels_off
from torch import Tensor
from triton_here import DEVICE, needs_triton, triton_kernels, use_triton

from lightning_cco.errors import CCOError
from lightning_cco.quantization import native, triton_calls
from lightning_cco.quantization.fake_quantize import fake_quantize
from lightning_cco.quantization.qparams import affine_qparams, quant_range, weight_scale
from lightning_cco.quantization.weight_fake_quantize import fake_quantize_weight
from lightning_cco.quantization.weight_recompute import RecomputedWeight

pytestmark = needs_triton
INF, NAN = math.inf, math.nan
TYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def equal_bits(got: Tensor, expected: Tensor) -> bool:
    got, expected = got.cpu(), expected.cpu()
    numbers = ~expected.isnan()
    same = got.view(INTEGERS[got.dtype])[numbers].equal(expected.view(INTEGERS[expected.dtype])[numbers])
    return got.dtype == expected.dtype and same and torch.equal(~got.isnan(), numbers)


def by_triton(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        use_triton(patch)
        return with_gradient(function, x.to(DEVICE), grad.to(DEVICE))


def by_operations(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        turn_kernels_off(patch)
        return with_gradient(function, x, grad)


def assert_same(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> None:
    for got, expected in zip(by_triton(function, x, grad), by_operations(function, x, grad), strict=True):
        assert equal_bits(got, expected)


def rounding(scale: float, zero_point: float, num_bits: int = 8, **options: Any) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        step, zero = torch.tensor(scale, device=x.device), torch.tensor(zero_point, device=x.device)
        return fake_quantize(x, step, zero, num_bits, **options)

    return function


@pytest.mark.parametrize("size", [0, 9, 2048, 2051])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("clamp", [None, (0.0, 6.0)], ids=str)
def test_activations(size: int, dtype: torch.dtype, clamp: tuple[float, float] | None) -> None:
    x, grad = (3 * torch.randn(size)).to(dtype), torch.randn(size).to(dtype)
    assert_same(rounding(0.0231, 3.0, 4, clamp=clamp), x, grad)


@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=40),
    scale=st.floats(2.0**-20, 1024.0, width=32),
    zero_point=st.integers(0, 255),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    limits=st.sampled_from([(-INF, INF), (0.0, INF), (0.0, 6.0), (-1.0, 1.0)]),
)
@example(values=[0.0], scale=2.0, zero_point=0, dtype=torch.float32, limits=(-1.0, 1.0))
@settings(max_examples=25, deadline=None)
def test_any_values_are_those_of_the_kernels_in_c(
    values: list[float], scale: float, zero_point: int, dtype: torch.dtype, limits: tuple[float, float]
) -> None:
    """NaN, infinities, denormal numbers; ties, as halves of the scale; the mask and the extrema, too."""
    x = torch.tensor([*values, *(scale * (level + 0.5) for level in range(-3, 4))]).to(dtype)
    numbers = scale, float(zero_point)
    found = []
    for patched in (use_triton, lambda patch: None):
        with pytest.MonkeyPatch.context() as patch:
            patched(patch)
            here = x.to(DEVICE if patched is use_triton else "cpu")
            ends = torch.tensor([INF, -INF], device=here.device)
            known = {} if patched is use_triton else {"numbers": numbers}
            function = rounding(*numbers, clamp=limits, extrema=ends, **known)
            result, gradient = with_gradient(function, here, torch.ones_like(here))
            found.append((result + 0.0, gradient, ends + 0.0))  # the larger of 0 and -0 is either of them
    for got, expected in zip(*found, strict=True):
        assert equal_bits(got, expected)


@pytest.mark.parametrize("num_bits", [2, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_activations_are_torchs_own_operation(num_bits: int, symmetric: bool) -> None:
    x, grad = 3 * torch.randn(3000), torch.randn(3000)
    scale, zero_point = affine_qparams(torch.tensor(-2.0), torch.tensor(3.0), num_bits, symmetric)
    got = by_triton(rounding(float(scale), float(zero_point), num_bits, symmetric=symmetric), x, grad)
    levels = quant_range(num_bits, symmetric)
    expected = with_gradient(lambda t: torch.fake_quantize_per_tensor_affine(t, float(scale), int(zero_point), *levels), x, grad)
    torch.testing.assert_close(got[0].cpu(), expected[0])
    assert torch.equal(got[1].cpu(), expected[1])


@pytest.mark.parametrize("before", [(INF, -INF), (-2.0, 2.0), (NAN, NAN), (-0.0, -0.5)], ids=str)
@pytest.mark.parametrize("values", [(1.0, 3.0), (-3.0, -1.0), (-1.0, 4.0), (-0.0, -0.0), (NAN, 1.0)], ids=str)
def test_extrema_widen_as_in_c(before: tuple[float, float], values: tuple[float, float]) -> None:
    """Floats are compared as integers there: signs, zeros and NaN, in several programs."""
    x = torch.full((2050,), sum(values) / 2 if values[0] == values[0] else 0.5)
    x[0], x[-1] = values
    mine, theirs = torch.tensor(before, device=DEVICE), torch.tensor(before)
    with pytest.MonkeyPatch.context() as patch:
        use_triton(patch)
        rounding(0.1, 0.0, extrema=mine)(x.to(DEVICE))
    native.load().widen(x, (-INF, INF), theirs)  # type: ignore[union-attr]
    assert torch.equal(mine.cpu().isnan(), theirs.isnan())
    assert torch.equal(mine.cpu().nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(lambda x: x.transpose(1, 2), id="transposed"),
        pytest.param(lambda x: x[:, ::2], id="strided"),
        pytest.param(lambda x: x[:1].expand(2, -1, -1, -1), id="expanded"),
        pytest.param(lambda x: x[:, :0], id="empty"),
        pytest.param(lambda x: x.flatten()[1:], id="not_aligned"),
    ],
)
def test_layouts(layout: Any) -> None:
    x, grad = layout(torch.randn(2, 6, 5, 4)), layout(torch.randn(2, 6, 5, 4))
    assert_same(rounding(0.01, 128.0), x, grad)
    assert_same(rounding(0.01, 128.0), x, grad.contiguous())


SHAPES = [((6, 30, 3, 3), 0), ((6, 4, 3, 3), 1), ((5, 40), 1), ((9,), 0), ((1, 600), 0), ((0, 3), 0)]


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_weights(shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    for channel, special in enumerate((0.0, NAN, INF, 1e-13)[: max(0, shape[axis] - 1)]):
        weight.select(axis, channel)[...] = special
    assert_same(lambda t: fake_quantize_weight(t, 8, axis), weight, torch.randn(shape).to(dtype))


@pytest.mark.parametrize(("num_bits", "dtype"), [(2, torch.float32), (3, torch.bfloat16), (4, torch.float16), (8, torch.float32)], ids=str)
def test_scales_that_lose_least(num_bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(7, 60).to(dtype)
    weight[2], weight[3], weight[4], weight[5] = 0.0, NAN, INF, 1e-13
    assert_same(lambda t: fake_quantize_weight(t, num_bits, 0, mse=True), weight, torch.randn(7, 60).to(dtype))


@given(st.lists(st.floats(-4.0, 4.0, width=32), min_size=16, max_size=16), st.sampled_from([1, 3, 7, 127]))
@settings(max_examples=4, deadline=None)
def test_scales_of_any_weight_are_those_of_the_kernels_in_c(values: list[float], limit: int) -> None:
    weight = torch.tensor(values).reshape(4, 4)
    mine, theirs = torch.empty(4, device=DEVICE), torch.empty(4)
    triton_kernels().fake_quantize_weight(weight.to(DEVICE), torch.empty_like(weight, device=DEVICE), 1, limit, 1e-12, mine, mse=True)
    native.load().weight_scale(weight, 1, limit, 1e-12, theirs, True)  # type: ignore[union-attr]
    assert equal_bits(mine, theirs)


@pytest.mark.parametrize("num_bits", [2, 8])
def test_weights_are_torchs_own_operation(num_bits: int) -> None:
    weight, grad = torch.randn(16, 8, 3, 3).to(memory_format=torch.channels_last), torch.randn(16, 8, 3, 3)
    scale, limit = weight_scale(weight, num_bits, 0).flatten(), quant_range(num_bits, symmetric=True)[1]
    got = by_triton(lambda t: fake_quantize_weight(t, num_bits, 0), weight, grad)
    zero = torch.zeros(16, dtype=torch.int32)
    expected = with_gradient(lambda t: torch.fake_quantize_per_channel_affine(t, scale, zero, 0, -limit, limit), weight, grad)
    torch.testing.assert_close(got[0].cpu(), expected[0])
    assert torch.equal(got[1].cpu(), expected[1])
    assert got[0].stride() == weight.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_is_made_again_in_the_backward(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 30, 3, 3).to(dtype).to(memory_format=torch.channels_last)
    made = []
    for kernels, where in ((triton_kernels(), DEVICE), (native.load(), "cpu")):
        recomputed = RecomputedWeight(weight.to(where), 0, kernels)
        rounded = fake_quantize_weight(weight.to(where), 8, 0, recomputed)
        made.append(recomputed.make())
        assert equal_bits(made[-1], rounded)
        assert rounded.stride() == weight.stride()
    assert equal_bits(*made)


def test_a_gradient_of_nobody_else_is_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    use_triton(monkeypatch)
    addresses, kept = [], []
    x = torch.randn(400, device=DEVICE, requires_grad=True)
    before = x * 1.0
    before.register_hook(lambda grad: addresses.append(grad.data_ptr()))
    rounded = rounding(0.001, 0.0)
    y = rounded(before)
    y.register_hook(lambda grad: addresses.append(grad.data_ptr()))
    (y * torch.randn(400, device=DEVICE)).sum().backward()
    assert addresses[0] == addresses[1]
    z = rounded(x * 2.0)
    z.register_hook(lambda grad: kept.extend((grad, grad.clone())))
    z.backward(torch.randn(400, device=DEVICE))
    assert torch.equal(*kept)


def test_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(500, device=DEVICE)
    expected = by_operations(rounding(0.02, 100.0), x.cpu(), torch.ones(500))
    use_triton(monkeypatch)
    made = x.clone().requires_grad_() * 1.0
    rounded = rounding(0.02, 100.0, inplace=True)(made)
    assert rounded.data_ptr() == made.data_ptr()
    assert equal_bits(rounded.detach(), expected[0])
    with torch.no_grad():
        assert rounding(0.02, 100.0, inplace=True)(x) is x
    assert equal_bits(x, expected[0])


@pytest.mark.parametrize("number", range(5))
def test_what_does_not_fit_is_an_error(number: int) -> None:
    """As in C, nothing is written past the end of a tensor."""
    kernels, x = triton_kernels(), torch.ones(64, device=DEVICE)
    one, mask = torch.ones((), device=DEVICE), torch.zeros(8, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(CCOError, match="Nothing was read or written"):
        [
            lambda: kernels.fake_quantize(x, x.half(), one, one, (0, 255), (-INF, INF), None, None),
            lambda: kernels.fake_quantize(x, x, one, one, (0, 255), (-INF, INF), mask[:7], None),
            lambda: kernels.fake_quantize(x, x, one, one, (0, 255), (-INF, INF), None, one),
            lambda: kernels.mask_gradient(x.view(8, 8), x.view(8, 8).t(), mask),
            lambda: kernels.fake_quantize_weight(x.view(8, 8), x.view(8, 8), 0, 300, 0.0),
        ][number]()


@pytest.mark.parametrize("reason", ["turned_off", "not_installed", "wrong", "fails"])
def test_without_them_there_is_one_line(reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(self: Any, device: torch.device) -> None:
        raise RuntimeError("no compiler")

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named '{name}'", name="triton")

    if reason == "turned_off":
        monkeypatch.setenv("LIGHTNING_CCO_NATIVE", "0")
    elif reason == "not_installed":
        monkeypatch.setattr(triton_calls.importlib, "import_module", missing)
    else:
        monkeypatch.setattr(triton_calls.TritonKernels, "wrong", fails if reason == "fails" else lambda self, device: "mask_gradient")
    caplog.set_level("INFO", "lightning_cco")
    monkeypatch.setattr(triton_calls, "_loaded", {})
    x = torch.ones(4, device=DEVICE)
    for _ in range(2):
        assert triton_calls.device_kernels_for(x, DEVICE) is None
    (line,) = caplog.records
    said = {"turned_off": "LIGHTNING_CCO_NATIVE=0", "not_installed": "triton is not installed", "wrong": "wrong code of 'mask_gradient'"}
    assert said.get(reason, "RuntimeError: no compiler") in line.getMessage()
