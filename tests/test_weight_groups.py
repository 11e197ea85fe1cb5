"""Weights with a scale for each group of inputs: which layers have them, and their rounding against PyTorch's own, by kernels, compiled and recomputed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_cco import CCOError, CCOWarning, quantize
from lightning_cco.quantization import weight_fake_quantize, weight_quantizer
from lightning_cco.quantization.planner import plan_quantization
from lightning_cco.quantization.qparams import quant_range
from lightning_cco.quantization.weight_quantizer import WeightQuantizer
from lightning_cco.settings import load_settings


class Decoder(nn.Module):
    """An embedding, a linear layer, products written by hand (weights on the right, as GPT-2 has them), a convolution, a head tied to the embedding."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding, self.up = nn.Embedding(48, width), nn.Linear(width, 4 * width)
        self.down, self.bias = nn.Parameter(0.1 * torch.randn(4 * width, width)), nn.Parameter(torch.randn(width))
        self.mix = nn.Parameter(0.1 * torch.randn(width, width))
        self.conv, self.norm = nn.Conv1d(width, width, 1), nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        h = torch.addmm(self.bias, torch.relu(self.up(x)).flatten(0, 1), self.down).view_as(x)
        x = self.norm(x + h @ self.mix)
        return (x + self.conv(x.mT).mT) @ self.embedding.weight.t()


IDS = torch.arange(24).reshape(2, 12)
GROUPS = {"weights_group_size": 32, "weights_num_bits": 4, "skip_tail_quantization": False}


def by_pytorch(weight: Tensor, bits: int, group: int, axis: int) -> Tensor:
    """Groups along the other axis than that of the channels, by PyTorch's own fake-quantization and scales of the largest magnitudes."""
    rows = (weight if axis == 0 else weight.t()).reshape(-1, group)
    low, high = quant_range(bits, symmetric=True)
    scale = rows.detach().abs().amax(1) / high
    rounded = torch.fake_quantize_per_channel_affine(rows, scale, torch.zeros(len(rows), dtype=torch.int32), 0, low, high)
    return rounded.reshape(weight.shape) if axis == 0 else rounded.reshape(weight.shape[::-1]).t()


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 32), (4, 32), (4, 128), (8, 64), (8, 256)])
def test_rounding_and_gradient_are_pytorchs(bits: int, group: int, axis: int, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setattr(weight_fake_quantize, "fitting_kernels", lambda tensor: None)
    weight = torch.randn(96 if axis == 0 else 256, 256 if axis == 0 else 96, requires_grad=True)
    quantizer, factor = WeightQuantizer(bits, axis, group=group), torch.randn(weight.shape)
    rounded = quantizer(weight)
    (gradient,) = torch.autograd.grad((rounded * factor).sum(), weight)
    expected = by_pytorch(weight, bits, group, axis)
    assert torch.allclose(rounded, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(gradient, factor)
    integers, scale = quantizer.quantize(weight)
    assert torch.equal(integers * quantizer.steps(weight), rounded.detach())
    assert scale.shape == ((96, 256 // group) if axis == 0 else (256 // group, 96))
    assert scale.numel() == quantizer.scales_of(weight)
    assert torch.equal(quantizer(weight.detach()), rounded.detach())


@pytest.mark.parametrize("bits", [2, 4])
def test_of_few_bits_a_group_has_the_scale_that_loses_least(bits: int) -> None:
    weight = torch.randn(64, 128)
    few, all_ = WeightQuantizer(bits, 0, "auto", 32), WeightQuantizer(bits, 0, "auto")
    plain = by_pytorch(weight, bits, 32, 0)
    error = (few(weight) - weight).square().sum()
    assert error < 0.95 * (plain - weight).square().sum()
    assert error < 0.97 * (all_(weight) - weight).square().sum()


def test_each_kind_of_layer_has_groups_of_its_own() -> None:
    quantized = quantize(Decoder(), {"global_quantization_settings": GROUPS}, (IDS,))
    decisions = quantized.plan.decisions
    found = {name: decision.weights_group_size for name, decision in decisions.items() if decision.weights_num_bits is not None}
    assert found == {"embedding": 32, "linear": 32, "addmm": 32, "matmul": 32, "conv": None, "matmul_1": 32}
    assert quantized.plan.weight_only == set(found) - {"conv"}
    assert decisions["conv"].quantized
    assert "groups of 32" in quantized.plan.skipped["linear"]
    quantizers = {name: (entry[0].group, entry[0].blocks) for name, entry in quantized.weights.items() if name in found}
    assert quantizers["linear"] == quantizers["embedding"] == (32, 1)
    assert quantizers["addmm"] == quantizers["matmul"] == quantizers["matmul_1"] == (32, 0)


def test_a_tied_head_reads_the_rounded_table() -> None:
    model = Decoder()
    quantized = quantize(model, {"global_quantization_settings": GROUPS}, (IDS,))
    table = model.embedding.weight
    (rows,), (columns,) = quantized.weights["embedding"], quantized.weights["matmul_1"]
    assert rows.kind == columns.kind
    assert torch.equal(rows(table), columns(table.t()).t())


@torch.no_grad()
def computes_with_weights_rounded(model: Decoder, expected: Decoder, rounded: Callable[[Tensor, int, int, int], Tensor]) -> bool:
    """Whether it computes what its float twin does whose weights are rounded to 4 bits in groups of 32, and symmetrically where these are no matrices."""
    for weight, axis in ((expected.embedding.weight, 0), (expected.up.weight, 0), (expected.down, 1), (expected.mix, 1)):
        weight.copy_(rounded(weight, 4, 32, axis))
    scale = expected.conv.weight.abs().amax((1, 2), keepdim=True) / 7
    expected.conv.weight.copy_((expected.conv.weight / scale).round() * scale)
    return torch.allclose(model(IDS), expected(IDS), rtol=1e-4, atol=1e-4)


def test_the_model_computes_with_weights_rounded_by_pytorch() -> None:
    model, recipe = Decoder(), {"global_quantization_settings": GROUPS | {"weight_only": True}}
    recipe["training_settings"] = {"weight_estimator": "minmax"}
    expected = copy.deepcopy(model)
    quantized = quantize(model, recipe, (IDS,))
    assert not quantized.plan.tensors  # weights alone
    quantized.calibrate([IDS])
    assert computes_with_weights_rounded(model, expected, by_pytorch)


def test_recomputed_and_kept_weights_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Decoder(128)
    recipe = {"global_quantization_settings": GROUPS | {"weight_only": True}}

    def gradients(**patches: Any) -> list[Tensor]:
        twin = copy.deepcopy(model)
        quantized = quantize(twin, recipe, (IDS,))
        quantized.calibrate([IDS])
        for name, value in patches.items():
            monkeypatch.setattr(weight_quantizer, name, value)
        twin(IDS).square().mean().backward()
        return [p.grad for p in twin.parameters() if p.grad is not None]

    recomputed = gradients()
    kept = gradients(recomputed_weight=lambda *args: None)
    assert all(torch.equal(a, b) for a, b in zip(recomputed, kept, strict=True))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 8)
        self.again = False

    def forward(self, x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(y)))

        return self.head(checkpoint(inner, x, use_reentrant=False) if self.again else inner(x))


def test_checkpointing_and_compiling_change_nothing() -> None:
    x, model = torch.randn(8, 64), Checkpointed()
    quantize(model, {"global_quantization_settings": GROUPS}, (x,)).calibrate([x])

    def gradients(call: Any) -> list[Tensor]:
        model.zero_grad()
        call(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients(model)
    model.again = True
    assert all(torch.allclose(a, b) for a, b in zip(plain, gradients(model), strict=True))
    model.again = False
    compiled = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(plain, compiled, strict=True))


def test_a_parametrized_weight_is_rounded_as_the_layer_sees_it() -> None:
    x = torch.randn(4, 64)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 32)), nn.ReLU(), nn.Linear(32, 4))
    quantized = quantize(model, {"global_quantization_settings": GROUPS}, (x,))
    quantized.calibrate([x])
    rounded = quantized.weights["linear"][0](model[0].weight)
    assert len(rounded.reshape(-1, 32)[0].unique()) <= 15
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("rules", "layer", "expected"),
    [
        ([{"match": "linear", "weights_group_size": 0}], "linear", (None, True)),
        ([{"match": "linear", "weight_only": False}], "linear", (None, True)),
        ([{"match": "linear", "weights_group_size": 64, "weights_num_bits": 8}], "linear", (64, False)),
        ([{"match": "linear", "skip_quantization": True}], "linear", (None, False)),
        ([{"match": "linear", "skip_quantization": False}], "linear", (32, False)),
        ([{"match": "*mul*", "weights_group_size": 16}, {"match": "linear", "weight_only": True}], "linear", (32, False)),
    ],
    ids=str,
)
def test_rules_and_groups(rules: list[dict[str, Any]], layer: str, expected: tuple[int | None, bool]) -> None:
    quantized = quantize(Decoder(), {"global_quantization_settings": GROUPS, "layer_settings": rules}, (IDS,))
    decision = quantized.plan.decisions[layer]
    assert (decision.weights_group_size, decision.quantized) == expected
    again = plan_quantization(quantized.graph, quantized.plan.resolved_settings())
    forms = [[(d.weights_num_bits, d.weights_group_size, d.quantized) for d in plan.decisions.values()] for plan in (quantized.plan, again)]
    assert forms[0] == forms[1]


def test_weights_alone_of_all_layers_but_those_that_a_rule_names() -> None:
    settings = {"weight_only": True, "skip_tail_quantization": False}
    quantized = quantize(Decoder(), {"global_quantization_settings": settings}, (IDS,))
    assert not quantized.plan.quantized
    assert not quantized.plan.tensors
    assert quantized.plan.weight_only == {"embedding", "linear", "addmm", "matmul", "conv", "matmul_1"}
    again = plan_quantization(quantized.graph, quantized.plan.resolved_settings())
    assert again.weight_only == quantized.plan.weight_only
    rules = [{"match": "linear", "weight_only": False}]
    assert quantize(Decoder(), {"global_quantization_settings": settings, "layer_settings": rules}, (IDS,)).plan.quantized == {"linear"}


def test_sizes_that_do_not_fit_are_said() -> None:
    model = nn.Sequential(nn.Linear(48, 100), nn.ReLU(), nn.Linear(100, 64), nn.ReLU(), nn.Linear(64, 4))
    x = torch.randn(2, 48)
    with pytest.warns(
        CCOWarning,
        match=r"'linear' has 48 inputs, and 16 divides them\. Write 16, or 0 .* one scale for each channel \(so have 'linear_1'\)",
    ):
        quantized = quantize(model, {"global_quantization_settings": GROUPS}, (x,))
    assert [quantized.plan.decisions[name].weights_group_size for name in ("linear", "linear_1", "linear_2")] == [None, None, 32]
    quantized.remove()
    for layer, message in (("linear_1", "has 100 inputs, and none of 16 to 256 divides them"), ("relu", r"kind relu\) can't have groups")):
        rule = {"match": layer, "weights_group_size": 32}
        with pytest.raises(CCOError, match=message):
            quantize(model, {"layer_settings": [rule]}, (x,))
    with pytest.raises(CCOError, match="expected 16, 32, 64, 128 or 256, or null, got 24"):
        load_settings({"global_quantization_settings": {"weights_group_size": 24}})
    with pytest.raises(CCOError, match="weight_only: false says something else"):
        load_settings({"layer_settings": [{"match": "a", "weights_group_size": 32, "weight_only": False}]})


def test_a_size_that_reaches_no_layer_is_said() -> None:
    """The head is in the tail: with convolutions alone, all weights have a scale for each channel."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    x = torch.randn(2, 1, 6, 6)
    with pytest.warns(CCOWarning, match="weights_group_size: 32 changes nothing"):
        quantize(model, {"global_quantization_settings": {"weights_group_size": 32}}, (x,)).remove()
    quantize(model, {"global_quantization_settings": {"weights_group_size": 32, "skip_tail_quantization": False}}, (x,)).remove()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"match": "*relu*", "weight_only": True}, "no layer there has weights. Name one that has: 'embedding'"),
        ({"match": "*relu*", "weights_group_size": 32}, "no linear layer, product with a matrix of weights or embedding is there"),
        ({"match": "conv*", "weights_group_size": 32}, "no linear layer, product with a matrix of weights or embedding is there"),
        ({"match": "mean*", "weight_only": True}, "no layer there has weights"),
        ({"match": "look*", "weight_only": True}, "'lookup' stays in float .*Leave weight_only out for it"),
    ],
    ids=str,
)
def test_rules_without_weights_to_quantize_are_said(rule: dict[str, Any], message: str) -> None:
    class Model(Decoder):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(48, 1))

        def forward(self, ids: Tensor) -> Tensor:
            return (super().forward(ids) * self.table[ids]).mean(1)

    with pytest.warns(CCOWarning, match=message):
        quantize(Model(), {"layer_settings": [rule]}, (IDS,))
