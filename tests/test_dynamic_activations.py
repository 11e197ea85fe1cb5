"""Activations that are rounded when the model runs: their rounding against ONNX Runtime's own, which layers read them, in training and in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from test_weight_groups import GROUPS, IDS, Decoder
from torch import Tensor, nn

from lightning_cco import CCOError, CCOWarning, quantize
from lightning_cco.export import weight_blocks
from lightning_cco.quantization import dynamic_activations
from lightning_cco.quantization.dynamic_activations import DynamicQuantizer
from lightning_cco.quantization.planner import plan_quantization
from lightning_cco.settings import load_settings

DYNAMIC = GROUPS | {"weight_only": True, "activations_dynamic": True}


def product_in_engine(x: Tensor, block: int, level: int) -> np.ndarray:
    """``x @ w`` by ONNX Runtime's MatMulNBits with weights of 8 bits that are the unit matrix, at an accuracy level."""
    size = x.shape[1]
    integers = torch.full((size, size), 128, dtype=torch.uint8) + torch.eye(size, dtype=torch.uint8)
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    constants = [integers.view(size, size // block, block).numpy(), np.ones((size, size // block), np.float32)]
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=size, N=size, bits=8, block_size=block, accuracy_level=level
    )
    ends = [helper.make_tensor_value_info(name, floats, [None, size]) for name in "xy"]
    initializers = [onnx.numpy_helper.from_array(array, name) for array, name in zip(constants, "ws", strict=True)]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    session = ort.InferenceSession(
        helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x.numpy()})[0]


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("block", [16, 32, 128, 256])
def test_values_are_rounded_as_the_engine_rounds_them(block: int, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setattr(dynamic_activations, "kernels_for", lambda tensor: None)
    torch.manual_seed(0)
    on_a_grid = torch.randint(-8, 9, (5, 512)) * (torch.rand(5, 1) + 0.1)  # values in the middle between two levels
    x = torch.cat([torch.randn(7, 512) * torch.randn(512).exp(), on_a_grid, torch.zeros(1, 512)])
    x = torch.cat([x, x[:1] / x[0].abs().max() * torch.tensor([4e-37, 3e-37, 1e-39, 1e-45]).unsqueeze(1)])  # what a GELU leaves far off
    rounded = DynamicQuantizer(block)(x)
    steps = DynamicQuantizer(block).steps(x).clamp(min=1e-30)
    off, off_floats = ((rounded - torch.from_numpy(product_in_engine(x, block, level))).abs().div(steps).max() for level in (4, 1))
    assert off < 0.25  # what is left of sums in float32 of 129 and 128 times a value
    assert off_floats > 0.4
    levels = (rounded / steps).reshape(-1, block)
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert set(levels.abs().amax(1).round().tolist()) == {0.0, 127.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_the_identity_and_compiled_graphs_round_alike(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 64).to(dtype).requires_grad_()
    factor, quantizer = torch.randn(2, 3, 64).to(dtype), DynamicQuantizer(32)
    (gradient,) = torch.autograd.grad((quantizer(x) * factor).sum(), x)
    assert torch.equal(gradient, factor)
    plain = quantizer(x.detach())
    assert torch.equal(plain, dynamic_activations._by_torch(x.detach().reshape(-1, 32)).view(x.shape))
    torch.compiler.reset()
    assert torch.equal(torch.compile(quantizer, backend="aot_eager", fullgraph=True)(x.detach()), plain)
    assert torch.equal(torch.func.vmap(quantizer)(x.detach()), plain)
    jacobian = torch.func.jacrev(lambda row: quantizer(row).sum())(x.detach()[0, 0].float())
    assert torch.equal(jacobian, torch.ones(64))


def test_what_products_read_is_rounded_and_nothing_else() -> None:
    model = Decoder()
    quantized = quantize(model, {"global_quantization_settings": DYNAMIC}, (IDS,))
    assert quantized.plan.dynamic == {"linear", "addmm", "matmul", "matmul_1"}
    assert not quantized.plan.tensors
    assert {name: d.activations_block for name, d in quantized.plan.decisions.items() if d.activations_block} == dict.fromkeys(
        quantized.plan.dynamic, 32
    )
    assert "4 more multiply integer weights with what they round when they run" in quantized.plan.summary
    quantized.calibrate([IDS])
    with torch.no_grad():
        weights = {name: quantizers[0] for name, quantizers in quantized.weights.items()}
        table, read = weights["embedding"](model.embedding.weight), DynamicQuantizer(32)
        x = table[IDS]
        h = torch.relu(nn.functional.linear(read(x), weights["linear"](model.up.weight), model.up.bias)).flatten(0, 1)
        h = torch.addmm(model.bias, read(h), weights["addmm"](model.down)).view_as(x)
        x = model.norm(x + read(h) @ weights["matmul"](model.mix))
        conv = nn.functional.conv1d(x.mT, weights["conv"](model.conv.weight), model.conv.bias).mT
        expected = read(x + conv) @ table.t()
        assert torch.allclose(model(IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([{"match": "linear", "activations_dynamic": False}], {"addmm", "matmul", "matmul_1"}),
        ([{"match": "linear", "weight_only": False}], {"addmm", "matmul", "matmul_1"}),
        ([{"match": "*", "activations_dynamic": False}, {"match": "linear", "activations_dynamic": True}], {"linear"}),
        ([{"match": "linear", "skip_quantization": True}], {"addmm", "matmul", "matmul_1"}),
        ([{"match": "linear", "weights_group_size": 0}], {"linear", "addmm", "matmul", "matmul_1"}),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_rules(rules: list[dict[str, Any]], expected: set[str], alone: bool) -> None:
    recipe = {"global_quantization_settings": DYNAMIC | {"weight_only": alone}, "layer_settings": rules}
    plan = quantize(Decoder(), recipe, (IDS,)).plan
    assert plan.dynamic == expected
    assert ("conv" in plan.quantized) is not alone
    again = plan_quantization(plan.graph, plan.resolved_settings())
    assert [d.activations_block for d in again.decisions.values()] == [d.activations_block for d in plan.decisions.values()]


def test_where_it_can_not_be_is_said() -> None:
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 64), nn.ReLU(), nn.Linear(64, 4))
    x = torch.randn(2, 64)

    def planned(overall: dict[str, Any], rules: list[dict[str, Any]] | None = None, target: str = "ort") -> None:
        overall = {"skip_tail_quantization": False} | overall
        recipe = {"global_quantization_settings": overall, "deployment_settings": {"target_framework": target}}
        quantize(model, recipe | {"layer_settings": rules or []}, (x,)).remove()

    with pytest.warns(
        CCOWarning, match=r"activations_dynamic: true, but layer 'linear_1' has 100 inputs, and none of 16 to 256 divides them"
    ):
        planned({"activations_dynamic": True})
    with pytest.raises(CCOError, match=r"the rule 'relu' sets activations_dynamic: true, but layer 'relu' \(kind relu\) can't"):
        planned({}, [{"match": "relu", "activations_dynamic": True}])
    with pytest.warns(CCOWarning, match=r"the rule '\*relu\*' sets activations_dynamic: true, but layer 'relu'"):
        planned({}, [{"match": "*relu*", "activations_dynamic": True}])
    with pytest.raises(CCOError, match=r"target_framework: openvino, which decides by itself, .* choose target_framework: ort"):
        planned({"activations_dynamic": True}, target="openvino")
    with pytest.raises(CCOError, match=r"target_framework: executorch, which was not tried with it"):
        planned({"activations_dynamic": True}, target="executorch")
    with pytest.raises(CCOError, match="weight_only: false asks for ranges that are calibrated"):
        load_settings({"layer_settings": [{"match": "a", "activations_dynamic": True, "weight_only": False}]})
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    with pytest.warns(CCOWarning, match="activations_dynamic: true changes nothing"):
        quantize(conv, {"global_quantization_settings": {"activations_dynamic": True}}, (torch.randn(1, 3, 8, 8),))


@pytest.mark.parametrize("recipe", ["w4a8_dynamic", "w8a8_dynamic"])
def test_the_file_computes_what_was_trained(recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantized = quantize(Decoder(), recipe, (IDS,))
    quantized.calibrate([IDS])
    report = quantized.export(tmp_path / "a.onnx")
    assert report.integer_nodes == {"MatMulNBits": 4, "GatherBlockQuantized": 1}
    assert report.dynamic == ["addmm", "linear", "matmul", "matmul_1"]
    assert report.sqnr_db > 60  # 40 where it rounds what training does not
    assert report.local_difference < 1e-4
    assert {entry.layer for entry in report.layers} == {f"{name}.read" for name in report.dynamic}
    assert all(entry.mean_steps < 0.01 for entry in report.layers)
    assert "rounded as it runs  what 4 products read" in str(report)
    assert not any("MatMulNBits" in note for note in report.notes)
    nodes = [node for node in onnx.load(tmp_path / "a.onnx").graph.node if node.op_type == "MatMulNBits"]
    levels = [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "accuracy_level"]
    assert levels == [4] * 4  # also in an engine that computes in float unless it is told otherwise


def test_a_product_that_reads_something_else_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = weight_blocks.product

    def shifted(write: Any, x: Tensor, block: Any) -> Tensor:
        return original(write, x * 1.1 if block.scale.shape[0] == 256 else x, block)

    monkeypatch.setattr(weight_blocks, "product", shifted)
    quantized = quantize(Decoder(), "w4a8_dynamic", (IDS,))
    quantized.calibrate([IDS])
    with pytest.raises(CCOError, match=r"'linear\.read' is .* steps off"):
        quantized.export(tmp_path / "a.onnx")


def test_a_file_without_the_operator_is_refused(tmp_path: Path) -> None:
    quantized = quantize(Decoder(), "w4a8_dynamic", (IDS,))
    quantized.calibrate([IDS])
    with pytest.raises(CCOError, match=r"layer 'linear' rounds what it reads when it runs .*Write activations_dynamic: false for it"):
        quantized.export(tmp_path / "a.pt2", pt2e=True)


def test_sensitivities_count_it() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(8, 64) * torch.randn(64).exp().pow(3), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    errors = []
    for dynamic in (False, True):
        overall = {"weight_only": True, "activations_dynamic": dynamic, "skip_tail_quantization": False, "weights_group_size": 64}
        quantized = quantize(model, {"global_quantization_settings": overall}, (x,))
        quantized.calibrate([x])
        errors.append(quantized.sensitivity([x]).main["linear"].qs)
        quantized.remove()
    assert errors[1] > 1.2 * errors[0]
