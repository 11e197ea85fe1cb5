"""Weights with zero points: their rounding against PyTorch's own, by kernels, torch, compiled and recomputed; which layers have them, and what is said."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_weight_groups import GROUPS, IDS, Decoder, computes_with_weights_rounded
from torch import Tensor, nn

from lightning_cco import CCOError, CCOWarning, quantize
from lightning_cco.quantization import affine_weights, weight_quantizer
from lightning_cco.quantization.affine_weight_quantizer import AffineWeightQuantizer
from lightning_cco.quantization.planner import plan_quantization
from lightning_cco.quantization.weight_quantizer import WeightQuantizer
from lightning_cco.tensor_views import TensorViews

AFFINE = GROUPS | {"weights_symmetric": False}


def by_pytorch(weight: Tensor, bits: int, group: int | None, axis: int) -> Tensor:
    """Groups along the other axis than that of the channels, by PyTorch's own fake-quantization, scales and zero points of its own observer's formula."""
    rows = (weight if axis == 0 else weight.t()).reshape(-1, group or weight.shape[1 - axis])
    last = 2**bits - 1
    low, high = rows.detach().amin(1).clamp(max=0), rows.detach().amax(1).clamp(min=0)
    scale = (high - low) / last
    zeros = (-torch.round(low / scale)).clamp(0, last).to(torch.int32)
    rounded = torch.fake_quantize_per_channel_affine(rows, scale, zeros, 0, 0, last)
    return rounded.reshape(weight.shape) if axis == 0 else rounded.reshape(weight.shape[::-1]).t()


def weight_of(axis: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    shape = (96, 256) if axis == 0 else (256, 96)
    return (torch.randn(shape) + torch.linspace(-1, 1, shape[1])).to(dtype)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 32), (4, 32), (4, 128), (8, 64), (8, 256), (4, None)])
def test_rounding_and_gradient_are_pytorchs(
    bits: int, group: int | None, axis: int, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(affine_weights, "kernels_for", lambda tensor: None)
    weight = weight_of(axis).requires_grad_()
    quantizer, factor = AffineWeightQuantizer(bits, axis, group=group), torch.randn(weight.shape)
    rounded = quantizer(weight)
    expected = by_pytorch(weight, bits, group, axis)
    (gradient,), (theirs,) = (torch.autograd.grad((made * factor).sum(), weight) for made in (rounded, expected))
    assert torch.allclose(rounded, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(gradient, factor)
    assert (
        gradient == theirs
    ).float().mean() > 0.999  # PyTorch has none where the rounding of a zero point has moved an end of a range out
    integers, scale = quantizer.quantize(weight)
    zeros = quantizer.zero_points(weight)
    assert integers.dtype is zeros.dtype is torch.int8
    assert int(integers.min()) == -(2 ** (bits - 1))
    assert int(integers.max()) == 2 ** (bits - 1) - 1
    assert torch.equal((integers.float() - quantizer._of_each(zeros).float()) * quantizer.steps(weight), rounded.detach())
    assert scale.shape == zeros.shape == ((96, 256 // (group or 256)) if axis == 0 else (256 // (group or 256), 96))
    assert scale.numel() == quantizer.scales_of(weight)
    first, last = quantizer.levels(weight)
    assert torch.equal(
        rounded.detach().div(quantizer.steps(weight)).round().clamp(first, last), (integers - quantizer._of_each(zeros).float())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["minmax", "mse"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_kernels_and_torch_and_compiled_graphs_round_alike(
    bits: int, estimator: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weight_of(0, dtype)
    weight[3], weight[4] = 0.0, weight[4].abs()
    for group in (16, 128, None):
        quantizer = AffineWeightQuantizer(bits, 0, estimator, group)
        rows = quantizer._rows(weight)
        by_kernels = quantizer(weight)
        with monkeypatch.context() as without:
            without.setattr(affine_weights, "kernels_for", lambda tensor: None)
            assert torch.equal(by_kernels, affine_weights._by_torch(rows, bits, estimator == "mse").view(weight.shape))
    torch.compiler.reset()
    traced = torch.compile(lambda w: quantizer(w), backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(weight), quantizer(weight))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_are_off_by_a_quarter_less_than_symmetric_ones(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 128)
    squares = [(kind(bits, 0, "auto", 32)(weight) - weight).square().sum() for kind in (AffineWeightQuantizer, WeightQuantizer)]
    assert squares[0] < 0.75 * squares[1]
    plain = (by_pytorch(weight, bits, 32, 0) - weight).square().sum()
    assert squares[0] < 0.97 * plain  # clipping loses less than the whole range does


def test_each_kind_of_layer_has_them_and_the_model_computes_with_them() -> None:
    model = Decoder()
    expected = copy.deepcopy(model)
    recipe = {"global_quantization_settings": AFFINE, "training_settings": {"weight_estimator": "minmax"}}
    quantized = quantize(model, recipe, (IDS,))
    decisions = {name: d.weights_symmetric for name, d in quantized.plan.decisions.items() if d.weights_num_bits is not None}
    assert decisions == {"embedding": False, "linear": False, "addmm": False, "matmul": False, "conv": True, "matmul_1": False}
    quantized.remove()
    recipe["global_quantization_settings"] |= {"weight_only": True}
    quantized = quantize(model, recipe, (IDS,))
    quantized.calibrate([IDS])
    assert computes_with_weights_rounded(model, expected, by_pytorch)


def test_recomputed_kept_and_compiled_weights_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Decoder(256)
    recipe = {"global_quantization_settings": AFFINE | {"weight_only": True}}

    def gradients(compiled: bool = False, **patches: Any) -> list[Tensor]:
        twin = copy.deepcopy(model)
        quantized = quantize(twin, recipe, (IDS,))
        quantized.calibrate([IDS])
        for name, value in patches.items():
            monkeypatch.setattr(weight_quantizer, name, value)
        call = torch.compile(twin, backend="aot_eager", fullgraph=True) if compiled else twin
        call(IDS).square().mean().backward()
        return [p.grad for p in twin.parameters() if p.grad is not None]

    made = []
    original = weight_quantizer.recomputed_weight
    recomputed = gradients(recomputed_weight=lambda *args: made.append(original(*args)) or made[-1])
    assert sum(entry is not None and entry.affine for entry in made) == 2  # of 256 x 1024 values
    kept = gradients(recomputed_weight=lambda *args: None)
    assert all(torch.equal(a, b) for a, b in zip(recomputed, kept, strict=True))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(gradients(True), kept, strict=True))


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([{"match": "linear", "weights_symmetric": True}], {"embedding", "addmm", "matmul", "matmul_1"}),
        ([{"match": "linear", "weights_group_size": 0, "weight_only": True}], {"embedding", "linear", "addmm", "matmul", "matmul_1"}),
        ([{"match": "*", "weights_symmetric": True}, {"match": "linear", "weights_symmetric": False}], {"linear"}),
        ([{"match": "linear", "skip_quantization": True}], {"embedding", "addmm", "matmul", "matmul_1"}),
    ],
)
def test_rules(rules: list[dict[str, Any]], expected: set[str]) -> None:
    plan = quantize(Decoder(), {"global_quantization_settings": AFFINE, "layer_settings": rules}, (IDS,)).plan
    assert {name for name, decision in plan.decisions.items() if not decision.weights_symmetric} == expected
    again = plan_quantization(plan.graph, plan.resolved_settings())
    assert [d.weights_symmetric for d in again.decisions.values()] == [d.weights_symmetric for d in plan.decisions.values()]


def test_where_they_can_not_be_is_said() -> None:
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 64), nn.ReLU(), nn.Linear(64, 4))
    x = torch.randn(2, 64)

    def planned(overall: dict[str, Any], rules: list[dict[str, Any]] | None = None, **sections: Any) -> None:
        overall = {"skip_tail_quantization": False} | overall
        quantize(model, {"global_quantization_settings": overall, "layer_settings": rules or [], **sections}, (x,)).remove()

    runs = r"layer 'linear' runs in INT8 in ort, .* want symmetric weights\. Write weights_group_size: 32 or weight_only: true"
    with pytest.warns(CCOWarning, match=runs + r".* \(so are those of 'linear_1', 'linear_2'\)"):
        planned({"weights_symmetric": False})
    with pytest.raises(CCOError, match=r"the rule 'linear' sets weights_symmetric: false, but " + runs):
        planned({}, [{"match": "linear", "weights_symmetric": False}])
    with pytest.warns(CCOWarning, match=runs):
        planned({}, [{"match": "*linear*", "weights_symmetric": False}])
    with pytest.warns(CCOWarning, match=r"the rule '\*relu\*' sets weights_symmetric: false, but layer 'relu' \(kind relu\) can't"):
        planned({}, [{"match": "*relu*", "weights_symmetric": False}])
    whole = [{"match": "linear_1", "weights_symmetric": True}]
    with pytest.warns(CCOWarning, match=r"'linear_1' has 100 inputs, and none of 16 to 256 divides them.* its weights are symmetric\."):
        planned({"weights_symmetric": False, "weight_only": True})
    with pytest.raises(CCOError, match=r"kind relu\) can't have zero points"):
        planned({}, [{"match": "relu", "weights_symmetric": False}])
    with pytest.raises(CCOError, match=r"target_framework: tensorrt, which was not tried with zero points"):
        planned({"weights_symmetric": False, "weight_only": True}, whole, deployment_settings={"target_framework": "tensorrt"})
    with pytest.raises(CCOError, match=r"learned scales are those of symmetric weights, but those of layer 'linear' have zero points"):
        planned({"weights_symmetric": False, "weight_only": True}, whole, training_settings={"weight_estimator": "learned"})


def test_levels_that_are_shown_hold_the_weights() -> None:
    weight = weight_of(0).abs() + 0.5
    views, quantizer = TensorViews(), AffineWeightQuantizer(4, 0, group=32)
    views.see_weight("linear", quantizer, weight, quantizer.steps(weight))
    view = views.weights["linear"]
    assert view.levels == (0.0, 15.0)  # symmetric ones would end at 7
    assert view.levels[0] <= view.histogram.low
    assert view.histogram.high <= view.levels[1] + 0.5
