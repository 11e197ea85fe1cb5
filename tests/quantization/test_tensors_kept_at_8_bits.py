"""Few bits are for what is multiplied as integers; what is only added, activated or handed to float layers keeps 8, and so do inputs of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx
import pytest
import torch
import torch.nn.functional as F
from models import ResidualCNN
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lightning_cco as cc
from lightning_cco.budget.search import BudgetSearch
from lightning_cco.monitoring.plan_log import plan_lines
from lightning_cco.quantization.tensor_key import TensorKey

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
PRODUCTS = {"conv", "linear", "matmul", "bmm", "conv_transpose", "addmm", "einsum"}
AVERAGES = {"adaptive_avg_pool", "mean"}
MOVES = {"flatten", "reshape", "view", "permute", "transpose", "max_pool", "getitem", "dropout", "unsqueeze", "squeeze", "chunk", "split"}


class Gates(nn.Module):
    """A SiLU after each convolution, a gate that multiplies two activations, and two branches that are put together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        h = F.hardswish(self.wide(x))
        x = F.relu(self.narrow(torch.cat([x, h], 1)))
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        return self.head(F.max_pool2d(x, 2).mean((2, 3)))


NETWORKS = {"residual": ResidualCNN, "gates": Gates}


def planned(name: str, bits: int, rules: list[dict[str, Any]] | None = None, **general: Any) -> cc.QuantizationPlan:
    torch.manual_seed(0)
    graph = cc.capture_graph(NETWORKS[name]().eval(), torch.randn(2, 1, 16, 16))
    everywhere = {"weights_num_bits": bits, "activations_num_bits": bits, **general}
    return cc.plan_quantization(graph, cc.load_settings({"global_quantization_settings": everywhere, "layer_settings": rules or []}))


def multiplied(plan: cc.QuantizationPlan, layer: str, bits: int = 4) -> bool:
    """Whether an INT8 product, of up to 3 bits also an average, is reached from a layer's result over layers that only move values."""
    whole = networkx.DiGraph((edge.source, edge.destination) for edge in plan.graph.edges)
    moving = [name for name in whole if plan.graph[name].kind in MOVES]
    near = whole.subgraph([*moving, layer])
    over = networkx.descendants(near, layer) | {layer}
    return any(
        plan.graph[reader].kind in (PRODUCTS | AVERAGES if bits < 4 else PRODUCTS) and reader in plan.quantized
        for name in over
        for reader in whole.successors(name)
    )


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_bits_are_those_of_the_readers(name: str, bits: int) -> None:
    plan = planned(name, bits)
    few = {key.layer for key, spec in plan.tensors.items() if spec.num_bits == bits}
    rest = {key.layer for key, spec in plan.tensors.items()} - few
    assert few
    assert len(rest) > 1
    for layer in few:
        assert multiplied(plan, layer, bits), layer
        assert layer not in plan.kept_at_8_bits
    for layer in rest:
        assert not multiplied(plan, layer, bits) or layer == "input_0", layer
        assert plan.tensors[TensorKey(layer)].num_bits == 8
    assert {layer for layer in rest if plan.graph[layer].kind != "add"} <= {*plan.kept_at_8_bits, *added(plan)}


def added(plan: cc.QuantizationPlan) -> set[str]:
    return {edge.source for edge in plan.graph.edges if plan.graph[edge.destination].kind == "add"}


def test_of_5_bits_and_more_all_have_what_is_asked_for() -> None:
    plan = planned("gates", 5)
    assert {spec.num_bits for spec in plan.tensors.values()} == {5}
    assert plan.decisions["conv"].weights_num_bits == 5
    assert plan.kept_at_8_bits == ()


class Normalized(nn.Module):
    """Pixels are normalized in the forward; two convolutions read them, a third one reads their results."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(8, 4, 3), nn.Linear(4, 2)
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / 0.25
        return self.head(F.relu(self.c(torch.cat([self.a(x), self.b(x)], 1))).mean((2, 3)))


def test_what_the_model_is_given_and_the_convolutions_of_it_keep_8_bits() -> None:
    general = {"global_quantization_settings": {"weights_num_bits": 2, "activations_num_bits": 2}}
    graph = cc.capture_graph(Normalized().eval(), torch.randn(2, 3, 8, 8))
    plan = cc.plan_quantization(graph, cc.load_settings(general))
    bits = {plan.graph[name].path: decision.weights_num_bits for name, decision in plan.decisions.items() if plan.graph[name].weighted}
    assert bits == {"a": 8, "b": 8, "c": 2, "head": None}
    read = {plan.origins[key].layer for key in plan.origins if key.layer in ("input_0", "sub", "div")}
    assert {plan.decisions[name].activations_num_bits for name in read} <= {8, None}
    (kept,) = [line for line in plan_lines(plan) if line.startswith("Kept at 8 bits")]
    assert "'conv', 'conv_1'" in kept
    named = {**general, "layer_settings": [{"match": "conv", "weights_num_bits": 3}]}
    decisions = cc.plan_quantization(graph, cc.load_settings(named)).decisions
    assert (decisions["conv"].weights_num_bits, decisions["conv_1"].weights_num_bits) == (3, 8)


class Read(TorchFunctionMode):
    """How many different values the functions of a forward read, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.levels: dict[str, list[int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor):
            self.levels.setdefault(getattr(func, "__name__", ""), []).append(len(args[0].unique()))
        return func(*args, **(kwargs or {}))


def test_so_it_is_in_the_running_model() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 1, 16, 16)
    quantized = cc.quantize(Gates().eval(), {"global_quantization_settings": {"activations_num_bits": 2}}, (x,))
    quantized.calibrate([x])
    with torch.no_grad(), Read() as read:
        quantized.model(x)
    assert max(read.levels["conv2d"][1:]) <= 4  # the first one reads the input
    assert read.levels["conv2d"][0] > 4
    assert min(read.levels["silu"] + read.levels["sigmoid"] + read.levels["linear"]) > 4


def test_a_rule_counts_for_them_as_well() -> None:
    layer = "adaptive_avg_pool"
    assert planned("residual", 2).decisions[layer].activations_num_bits == 8
    assert planned("residual", 2, [{"match": layer, "activations_num_bits": 3}]).decisions[layer].activations_num_bits == 3
    everything = planned("residual", 2, [{"match": "*", "activations_num_bits": 2}], residual_stream="quantized")
    assert {spec.num_bits for spec in everything.tensors.values()} == {2}


def test_the_residual_stream_of_few_bits_stays_so() -> None:
    plan = planned("residual", 2, residual_stream="quantized")
    added = [edge.source for edge in plan.graph.edges if plan.graph[edge.destination].kind == "add"]
    assert {plan.decisions[name].activations_num_bits for name in added} == {2}


def test_a_skipped_convolution_has_no_bits_to_keep() -> None:
    assert "conv" in planned("residual", 2).kept_at_8_bits
    assert "conv" not in planned("residual", 2, [{"match": "conv", "skip_quantization": True}]).kept_at_8_bits


@pytest.mark.parametrize("name", NETWORKS)
def test_the_resolved_recipe_says_the_same(name: str) -> None:
    plan = planned(name, 3)
    assert cc.plan_quantization(plan.graph, plan.resolved_settings()).tensors == plan.tensors


@pytest.mark.parametrize("name", ["gates", pytest.param("residual", marks=pytest.mark.slow)])
def test_the_file_computes_what_the_model_does(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 1, 16, 16)
    recipe = {"global_quantization_settings": {"weights_num_bits": 3, "activations_num_bits": 3}}
    quantized = cc.quantize(NETWORKS[name]().eval(), recipe, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "model.onnx", (x,))
    assert report.sqnr_db > 30
    assert not [island for island in report.float_islands if island.reason.startswith("planned in INT8")]


def test_a_budget_leaves_them_at_8_bits() -> None:
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    x = torch.randn(16, 1, 16, 16)
    settings = cc.load_settings({"global_quantization_settings": {"activations_num_bits": 4}, "budget_settings": {"average_bits": 5}})
    quantized = cc.quantize(ResidualCNN().eval(), settings, (x,))
    quantized.calibrate([[x]])
    search = BudgetSearch(
        quantized,
        settings,
        lambda names: quantized.calibrate([[x]], only=names),
        lambda *bits: quantized.loss_sensitivity([[x]], None, None, *bits),
        lambda model, batch: model(*batch),
    )
    search.find([x])
    plan = quantized.plan
    assert any(key.layer == "adaptive_avg_pool" for key in plan.tensors)
    for key, spec in plan.tensors.items():
        assert spec.num_bits == (4 if multiplied(plan, key.layer) and key.layer != "input_0" else 8), key
