"""Scales of weights at which rounding and clipping lose least: against a search in float64, and equal by kernels, by torch, compiled and traced."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kernels_off import turn_kernels_off
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_cco import CCOError, quantize
from lightning_cco.quantization import native, operations, weight_quantizer
from lightning_cco.quantization.qparams import quant_range, weight_scale
from lightning_cco.quantization.weight_fake_quantize import fake_quantize_weight
from lightning_cco.quantization.weight_quantizer import WeightQuantizer
from lightning_cco.quantization.weight_recompute import RecomputedWeight

needs_kernels = pytest.mark.skipif(native.load() is None, reason="there is no C compiler")
SHAPES = [((6, 300, 3, 3), 0), ((4, 7, 3, 3), 1), ((33, 1, 3, 3), 0), ((50, 700), 1), ((9,), 0)]
INF, NAN = float("inf"), float("nan")


def by_torch(weight: Tensor, num_bits: int, axis: int) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        turn_kernels_off(patch)
        return fake_quantize_weight(weight, num_bits, axis, None, True)


def squared_errors(weight: Tensor, scale: Tensor, limit: int) -> Tensor:
    """Of each channel, in float64, for scales of shape (..., channels)."""
    rows, scale = weight.double(), scale.double().unsqueeze(-1)
    return ((rows / scale).round().clamp(-limit, limit) * scale - rows).square().sum(-1)


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [lambda: torch.randn(20, 400), lambda: torch.randn(20, 9), lambda: torch.randn(20, 300) ** 3], ids="abc")
def test_no_other_scale_loses_less(num_bits: int, rows: Any) -> None:
    weight, limit = rows(), quant_range(num_bits, symmetric=True)[1]
    scale = weight_scale(weight, num_bits, 0, True).flatten()
    others = weight_scale(weight, num_bits, 0).flatten() * torch.linspace(0.02, 1.0, 400)[:, None]
    found, least = squared_errors(weight, scale, limit), squared_errors(weight, others, limit).amin(0)
    assert num_bits == 8 or (found <= 1.03 * least).all()  # of many levels it is chance which of two near ones is better
    assert (found <= 1.03 * squared_errors(weight, others[-1], limit)).all()


def test_two_bits_keep_more_than_a_fifth_of_the_weights() -> None:
    weight = torch.randn(16, 576)
    kept = [float((fake_quantize_weight(weight, 2, 0, None, mse) != 0).float().mean()) for mse in (False, True)]
    assert kept[0] < 0.2 < 0.45 < kept[1]


@needs_kernels
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_bits", [2, 3, 4, 5, 8])
def test_kernels_and_torch_agree_to_the_last_bit(num_bits: int, dtype: torch.dtype, shape: tuple[int, ...], axis: int) -> None:
    weight = torch.randn(shape).to(dtype)
    for channel, value in enumerate((0.0, 1e-13, 3e38, INF, NAN)):
        weight.select(axis, channel)[...] = value
    weight.select(axis, 5).reshape(-1)[0] = -INF
    expected = by_torch(weight, num_bits, axis)
    found = fake_quantize_weight(weight, num_bits, axis, None, True)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    strided = torch.stack([weight, weight], -1)[..., 0]  # has no kernel
    assert torch.equal(fake_quantize_weight(strided, num_bits, axis, None, True).nan_to_num(), expected.nan_to_num())


@needs_kernels
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_equal_ratios_of_equal_errors(shape: tuple[int, ...], axis: int) -> None:
    """Few different values, so that many ratios are as good as the best one."""
    for num_bits in (2, 3, 4):
        weight = torch.randint(-3, 4, shape).float()
        assert torch.equal(fake_quantize_weight(weight, num_bits, axis, None, True), by_torch(weight, num_bits, axis))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("without_kernels", [False, True])
def test_a_compiled_weight_is_an_eager_one(backend: str, without_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if without_kernels:
        monkeypatch.setattr(operations, "has_operations", lambda x: False)
    torch._dynamo.reset()
    weight = torch.randn(8, 3, 3, 3, requires_grad=True)
    compiled = torch.compile(lambda w: fake_quantize_weight(w, 3, 0, None, True), backend=backend, fullgraph=True)
    result = compiled(weight)
    assert torch.equal(result, fake_quantize_weight(weight, 3, 0, None, True))
    result.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))  # type: ignore[arg-type]


@needs_kernels
def test_the_operation_passes_the_checks_of_torch() -> None:
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.lightning_cco.weight_scale, (torch.randn(6, 4, 2), 1, 1, 1e-12, True), test_utils=checks)


def test_traced_and_transformed_weights_are_the_same() -> None:
    quantizer, weight = WeightQuantizer(2, 0, "mse"), torch.randn(3, 6, 40)
    expected = torch.stack([quantizer(one) for one in weight])
    assert torch.equal(torch.func.vmap(quantizer)(weight), expected)
    assert torch.equal(make_fx(quantizer)(weight[0])(weight[0]), expected[0])
    gradient = torch.func.grad(lambda w: (quantizer(w) * weight[1]).sum())(weight[0])
    assert torch.equal(gradient, weight[1])


def test_a_large_weight_is_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(5, 70)
    expected = weight_scale(weight, 3, 0, True)
    monkeypatch.setattr("lightning_cco.quantization.weight_clipping._MOST_AT_ONCE", 1000)
    assert torch.equal(weight_scale(weight, 3, 0, True), expected)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_made_again_clips_at_the_same_scales(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 300).to(dtype)
    recomputed = RecomputedWeight(weight, 0, native.load())
    rounded = fake_quantize_weight(weight, 2, 0, recomputed, True)
    assert torch.equal(rounded, by_torch(weight, 2, 0))
    assert torch.equal(recomputed.make(), rounded)
    with torch.autograd.forward_ad.dual_level():  # where there are no kernels
        assert torch.equal(recomputed.make(), rounded)


@needs_kernels
def test_gradients_are_those_of_weights_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 2)), torch.randn(4, 200)
    found = []
    for keep in (False, True):
        one = copy.deepcopy(model)
        quantize(one, {"global_quantization_settings": {"weights_num_bits": 2}}, (x,)).calibrate([x])
        if keep:
            monkeypatch.setattr(weight_quantizer, "recomputed_weight", lambda weight, axis: None)
        one(x).square().sum().backward()
        found.append([parameter.grad for parameter in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "axis"), [*SHAPES, ((5, 6, 7), None)], ids=str)
def test_integers_and_scale_are_those_of_the_training(shape: tuple[int, ...], axis: int | None) -> None:
    weight, quantizer = torch.randn(shape), WeightQuantizer(2, axis, "auto")
    integers, scale = quantizer.quantize(weight)
    assert integers.unique().tolist() == [-1, 0, 1] if shape != (9,) else [-1, 1]
    assert torch.equal(integers * scale, quantizer(weight))


@needs_kernels
@pytest.mark.parametrize("limit", [0, 128, 1000])
def test_levels_beyond_the_kernels_tables_are_an_error(limit: int) -> None:
    weight, scales = torch.ones(8, 8), torch.ones(8)
    with pytest.raises(CCOError, match="a largest level of 1 to 127"):
        native.load().weight_scale(weight, 0, limit, 1e-12, scales, True)  # type: ignore[union-attr]
