"""The compiled kernels give what the torch operations give, to the last bit."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_off import turn_kernels_off
from torch import Tensor

from lightning_cco.quantization import kernel_library, native
from lightning_cco.quantization.fake_quantize import fake_quantize
from lightning_cco.quantization.qparams import affine_qparams, grid_of, quant_range
from lightning_cco.quantization.weight_fake_quantize import fake_quantize_weight

pytestmark = pytest.mark.skipif(native.load() is None, reason="there is no C compiler")

INF, NAN = float("inf"), float("nan")
# Around the kernels' blocks, bytes of a mask and share of a thread.
SIZES = [0, 1, 7, 8, 9, 63, 511, 512, 513, 1537, 70_001]


def forward_and_backward(function: Any, x: Tensor, grad: Tensor, without_kernels: bool) -> tuple[Tensor, Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        if without_kernels:
            turn_kernels_off(patch)
        y = function(x)
        y.backward(grad)
    return y.detach(), x.grad


def assert_same(function: Any, x: Tensor, grad: Tensor) -> None:
    by_kernels, by_operations = (forward_and_backward(function, x, grad, without) for without in (False, True))
    for got, expected in zip(by_kernels, by_operations, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clamp", [None, (0.0, INF), (0.0, 6.0), (-1.0, 1.0)], ids=str)
def test_activations(size: int, dtype: torch.dtype, clamp: tuple[float, float] | None) -> None:
    x, grad = (3 * torch.randn(size)).to(dtype), torch.randn(size).to(dtype)
    for num_bits in (2, 8):
        scale, zero_point = affine_qparams(torch.tensor(-2.0), torch.tensor(5.0), num_bits)
        numbers = float(scale), float(zero_point)
        assert_same(lambda t: fake_quantize(t, scale, zero_point, num_bits, clamp=clamp, numbers=numbers), x, grad)  # noqa: B023


@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=40),
    scale=st.floats(2.0**-20, 1024.0, width=32),
    zero_point=st.integers(0, 255),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=300, deadline=None)
def test_any_values(values: list[float], scale: float, zero_point: int, dtype: torch.dtype) -> None:
    """NaN, infinities, ties, denormal numbers."""
    x = torch.tensor(values).to(dtype)
    parameters = torch.tensor(scale), torch.tensor(float(zero_point))
    assert_same(lambda t: fake_quantize(t, *parameters, 8, numbers=(scale, float(zero_point))), x, torch.ones_like(x))


@given(
    scale=st.floats(2.0**-20, 1024.0, width=32),
    num_bits=st.sampled_from([2, 4, 8]),
    symmetric=st.booleans(),
    share=st.floats(0.0, 1.0),
    clamp=st.sampled_from([(-INF, INF), (0.0, INF), (0.0, 6.0), (-1.0, 1.0), (-INF, 0.3), (-0.7, 2.5)]),
)
@settings(max_examples=200, deadline=None)
def test_a_grid_that_is_kept_ready(scale: float, num_bits: int, symmetric: bool, share: float, clamp: tuple[float, float]) -> None:
    levels = quant_range(num_bits, symmetric)
    zero_point = 0.0 if symmetric else float(round(share * levels[1]))
    kernels = native.load()
    assert kernels is not None
    grid = grid_of(scale, zero_point, num_bits, symmetric, clamp)
    ready = kernels.ready((scale, zero_point), levels, clamp, torch.float32)
    limits = torch.tensor(clamp).tolist()
    assert list(struct.unpack("7f", ready.numbers)) == [scale, grid.first, grid.last, grid.low, grid.high, *limits]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(lambda x: x.transpose(1, 2), id="transposed"),
        pytest.param(lambda x: x[:, ::2], id="strided"),
        pytest.param(lambda x: x[:1].expand(2, -1, -1, -1), id="expanded"),
    ],
)
def test_layouts(layout: Any) -> None:
    x, grad = layout(torch.randn(2, 6, 5, 4)), layout(torch.randn(2, 6, 5, 4))
    numbers = 0.01, 128.0
    assert_same(lambda t: fake_quantize(t, torch.tensor(0.01), torch.tensor(128.0), 8, numbers=numbers), x, grad)
    assert_same(lambda t: fake_quantize(t, torch.tensor(0.01), torch.tensor(128.0), 8, numbers=numbers), x, grad.contiguous())


@pytest.mark.parametrize(("shape", "axis"), [((6, 300, 3, 3), 0), ((6, 4, 3, 3), 1), ((50, 70), 0), ((50, 70), 1), ((9,), 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("special", [None, 0.0, NAN, INF], ids=str)
def test_weights(shape: tuple[int, ...], axis: int, dtype: torch.dtype, special: float | None) -> None:
    weight = torch.randn(shape).to(dtype)
    if special is not None:
        weight.select(axis, 2)[...] = special
    assert_same(lambda t: fake_quantize_weight(t, 8, axis), weight, torch.randn(shape).to(dtype))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("mse", [False, True])
def test_weights_in_any_order_of_memory(axis: int, mse: bool) -> None:
    """Channels last, and the transpose of a matrix: rounded where they are, as dense tensors."""
    for weight in (torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last), torch.randn(7, 5).t(), torch.randn(6, 1, 3, 3)):
        assert_same(lambda t: fake_quantize_weight(t, 3, axis, mse=mse), weight, torch.randn(weight.shape))
        assert fake_quantize_weight(weight, 3, axis).stride() == weight.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_energies(dtype: torch.dtype) -> None:
    kernels = native.load()
    x, y = torch.randn(70_001).to(dtype), torch.randn(70_001).to(dtype)
    expected = float((y.double() - x.double()).square().sum()), float(x.double().square().sum())
    assert kernels.energies(x, y) == pytest.approx(expected, rel=1e-6)
    rounded = fake_quantize(x, torch.tensor(0.02), torch.tensor(128.0), 8)
    assert kernels.rounding_energies(x, 0.02, (-128.0, 127.0)) == pytest.approx(kernels.energies(x, rounded), rel=1e-12)


def test_what_others_hold_of_a_gradient_is_not_overwritten() -> None:
    """A gradient may be overwritten only if nobody else sees it: hooks, ``retain_grad``, both operands of an addition, the caller's own tensor."""
    x = torch.randn(400, requires_grad=True)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def rounded(t: Tensor) -> Tensor:
        return fake_quantize(t, torch.tensor(0.001), torch.tensor(0.0), 8, numbers=(0.001, 0.0))  # clips nearly all

    def remember(name: str) -> Any:
        return lambda grad: seen.__setitem__(name, (grad, grad.clone()))

    a, b = rounded(x * 1.0), rounded(x * 2.0)
    a.register_hook(remember("hook"))
    b.retain_grad()
    b.grad_fn.register_prehook(lambda grads: seen.__setitem__("prehook", (grads[0], grads[0].clone())))
    total = a + b + (x * 3.0)
    total.register_hook(remember("sum"))
    given_grad = torch.randn(400)
    total.backward(given_grad.requires_grad_(False))
    for name, (grad, copy) in seen.items():
        assert torch.equal(grad, copy), name
    assert torch.equal(b.grad, given_grad)
    inside = (x > -0.0005) & (x < 0.2555)
    inside_of_double = (2 * x > -0.0005) & (2 * x < 0.2555)
    torch.testing.assert_close(x.grad, given_grad * (3.0 + inside + 2.0 * inside_of_double))


def test_a_gradient_of_nobody_else_is_overwritten() -> None:
    """Else the backward would need fresh memory for each activation."""
    addresses = []
    x = torch.randn(400, requires_grad=True)
    before = x * 1.0
    before.register_hook(lambda grad: addresses.append(grad.data_ptr()))
    y = fake_quantize(before, torch.tensor(0.001), torch.tensor(0.0), 8, numbers=(0.001, 0.0))
    y.register_hook(lambda grad: addresses.append(grad.data_ptr()))
    (y * torch.randn(400)).sum().backward()
    assert addresses[0] == addresses[1]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({}, True, id="compiled"),
        pytest.param({"LIGHTNING_CCO_NATIVE": "0"}, False, id="turned_off"),
        pytest.param({"PATH": "", "CC": ""}, False, id="no_compiler"),
        pytest.param({"CC": "false"}, False, id="a_compiler_that_fails"),
    ],
)
def test_with_and_without_a_compiler(environment: dict[str, str], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"XDG_CACHE_HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value)
    load = native.load.__wrapped__
    assert (load() is not None) == expected
    libraries = list(tmp_path.rglob("*.so"))
    assert len(libraries) == expected
    if expected:  # the second time out of the cache
        monkeypatch.setenv("CC", "false")
        monkeypatch.setattr(kernel_library, "_compile", lambda command, library: pytest.fail("compiled again"))
        assert load() is not None


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:4096] + bytes(4096) + data[8192:]]
)
def test_a_damaged_library_is_compiled_again(
    damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel_library.open_library() is not None
    (path,) = tmp_path.rglob("*.so")
    data = path.read_bytes()
    path.unlink()  # this process has it in its memory
    path.write_bytes(damage(data))
    assert native.load.__wrapped__() is not None
    assert "damaged" in caplog.text
    (path,) = tmp_path.rglob("*.so")
    assert kernel_library._hash_of(path) == path.stem.rpartition("-")[2]


def test_wrong_code_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native, "wrong_function", lambda library: "widen")
    assert native.load.__wrapped__() is None
    assert "wrong code of 'widen'" in caplog.text
