"""The plan quantizes what it may, skips what it must, and says why."""

from __future__ import annotations

import pytest
import torch
from models import GuideCNN, ResidualCNN, TokenModel
from torch import Tensor, nn

from lightning_cco import LayerQuantizationSettings, Settings, capture_graph, generate_default_settings, plan_quantization
from lightning_cco.errors import CCOError
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.settings import load_settings


@pytest.fixture(scope="module")
def cnn() -> LayerGraph:
    return capture_graph(GuideCNN(), GuideCNN.example())


@pytest.fixture(scope="module")
def residual() -> LayerGraph:
    return capture_graph(ResidualCNN(), ResidualCNN.example())


@pytest.fixture(scope="module")
def tokens() -> LayerGraph:
    return capture_graph(TokenModel(), TokenModel.example())


def plan(graph: LayerGraph, *rules: dict[str, object], **general: object) -> QuantizationPlan:
    return plan_quantization(graph, load_settings({"layer_settings": list(rules), "global_quantization_settings": general}))


def test_default_plan_of_the_guides_cnn(cnn: LayerGraph) -> None:
    found = plan_quantization(cnn)
    assert found.quantized == {"input_0", "conv", "relu", "conv_1", "relu_1", "max_pool", "flatten", "linear", "relu_2"}
    assert set(found.skipped) == {"linear_1", "dropout", "dropout_1"}
    assert found.skipped["linear_1"].startswith("tail")
    assert (found.counted, len(found.quantized)) == (10, 9)  # as the guide's own log prints
    assert [(b.source, b.destination, b.direction) for b in found.boundaries] == [("relu_2", "linear_1", "INT8 → float")]


def test_groups_are_quantized_at_their_end(residual: LayerGraph) -> None:
    found = plan_quantization(residual)
    # conv → batch norm → relu: one tensor; the second conv → batch norm goes into the addition: one more; the addition → relu: one more.
    assert list(found.tensors) == [
        "input_0",
        "relu",
        "relu_1",
        "batch_norm_2",
        "relu_2",
        "relu_3",
        "batch_norm_4",
        "relu_4",
        "adaptive_avg_pool",
    ]
    assert found.decisions["conv"].activations_num_bits is None
    assert found.decisions["batch_norm"].quantized


def test_embedding_indices_are_skipped_by_themselves(tokens: LayerGraph) -> None:
    found = plan_quantization(tokens)
    assert found.skipped["input_0"].startswith("integer")
    assert "embedding" in found.quantized
    assert found.decisions["embedding"].weights_num_bits == 8
    assert found.skipped["layer_norm"].startswith("rule")
    # What a float layer makes for an INT8 one is quantized all the same.
    assert "layer_norm" in found.tensors
    assert "gelu" in found.tensors


def test_guide_example_until(residual: LayerGraph) -> None:
    settings = generate_default_settings()
    rule = LayerQuantizationSettings(skip_quantization=True, skip_quantization_until=["linear"])
    settings.set_quantization_settings_for_layer("adaptive_avg_pool", rule)
    found = plan_quantization(residual, settings)
    assert {name for name, reason in found.skipped.items() if reason.startswith("setting")} == {"adaptive_avg_pool", "flatten"}
    assert "until 'linear'" in found.skipped["flatten"]


def test_guide_example_downstream(residual: LayerGraph) -> None:
    settings = generate_default_settings()
    settings.set_quantization_settings_for_layer(
        "adaptive_avg_pool", LayerQuantizationSettings(skip_quantization=True, skip_quantization_downstream=True)
    )
    assert set(plan_quantization(residual, settings).skipped) == {"adaptive_avg_pool", "flatten", "linear"}


def test_guide_example_input(tokens: LayerGraph) -> None:
    settings = generate_default_settings()
    settings.set_quantization_settings_for_layer("input_0", LayerQuantizationSettings(skip_quantization=True))
    assert "input_0" in plan_quantization(tokens, settings).skipped


def test_bits_per_layer_and_the_more_exact_rule_wins(residual: LayerGraph) -> None:
    found = plan(
        residual,
        {"match": "conv*", "weights_num_bits": 4},
        {"match": "blocks.0", "weights_num_bits": 5, "activations_num_bits": 6},
        {"match": "conv_1", "weights_num_bits": 3},
    )
    bits = {name: found.decisions[name].weights_num_bits for name in ("conv", "conv_1", "conv_2", "conv_3")}
    assert bits == {"conv": 4, "conv_1": 3, "conv_2": 5, "conv_3": 4}
    assert found.decisions["relu_1"].activations_num_bits == 6
    assert found.decisions["relu_3"].activations_num_bits == 8


def test_bits_of_a_group_follow_the_layer_that_begins_it(residual: LayerGraph) -> None:
    assert plan(residual, {"match": "conv_1", "activations_num_bits": 4}).tensors["relu_1"].num_bits == 4


def test_a_layer_of_the_tail_can_be_asked_for(cnn: LayerGraph) -> None:
    assert "linear_1" in plan(cnn, {"match": "linear_1", "skip_quantization": False}).quantized
    assert "linear_1" in plan(cnn, skip_tail_quantization=False).quantized


def test_a_skipped_layer_keeps_what_its_neighbours_need(cnn: LayerGraph) -> None:
    found = plan(cnn, {"match": "conv_1", "skip_quantization": True})
    # relu is read by the float conv_1 but ends the INT8 group of conv; relu_1 is INT8 by itself, so what it reads must be quantized too.
    assert "relu" in found.tensors
    assert "conv_1" in found.tensors
    assert {(b.source, b.destination, b.direction) for b in found.boundaries} >= {
        ("relu", "conv_1", "INT8 → float"),
        ("conv_1", "relu_1", "float → INT8"),
    }


@pytest.mark.parametrize("rules", [[], [{"match": "conv_1", "skip_quantization": True}], [{"match": "stem", "weights_num_bits": 4}]])
def test_the_resolved_recipe_gives_the_same_plan(residual: LayerGraph, rules: list[dict[str, object]]) -> None:
    found = plan(residual, *rules)
    again = plan_quantization(residual, load_settings(found.resolved_settings().to_dict()))
    assert again.quantized == found.quantized
    assert again.tensors == found.tensors
    assert {n: d.weights_num_bits for n, d in again.decisions.items()} == {n: d.weights_num_bits for n, d in found.decisions.items()}


def test_suggestions_are_skipped_with_their_reason(cnn: LayerGraph) -> None:
    found = plan_quantization(cnn, suggestions=["conv_1"])
    assert found.skipped["conv_1"].startswith("suggestion")


@pytest.mark.parametrize("target", ["tensorrt", "trt"])
def test_tensorrt_takes_symmetric_activations(cnn: LayerGraph, target: str) -> None:
    found = plan_quantization(cnn, load_settings({"deployment_settings": {"target_framework": target}}))
    assert all(spec.symmetric for spec in found.tensors.values())


def test_unknown_layer_names_the_nearest(cnn: LayerGraph) -> None:
    with pytest.raises(CCOError, match="conv_1"):
        plan(cnn, {"match": "convv_1", "skip_quantization": True})


def test_unreachable_destination(cnn: LayerGraph) -> None:
    with pytest.raises(CCOError, match="conv"):
        plan(cnn, {"match": "linear", "skip_quantization": True, "skip_quantization_until": ["conv"]})


def test_contradicting_rules(cnn: LayerGraph) -> None:
    with pytest.raises(CCOError, match=r"contradict.*conv_1.*Remove one"):
        plan(cnn, {"match": "conv_*", "skip_quantization": True}, {"match": "con*_1", "skip_quantization": False})


def test_quantizing_an_index_input_is_refused(tokens: LayerGraph) -> None:
    with pytest.raises(CCOError, match=r"input_0.*integers.*embedding"):
        plan(tokens, {"match": "input_0", "skip_quantization": False})


def test_unknown_suggestion(cnn: LayerGraph) -> None:
    with pytest.raises(CCOError, match="nothing_here"):
        plan_quantization(cnn, Settings(), suggestions=["nothing_here"])


def test_masked_scores_stay_in_float() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.fc(x) + torch.full((2, 4), float("-inf")).triu(1)
            return self.out(scores.softmax(-1))

    settings = load_settings({"global_quantization_settings": {"skip_tail_quantization": False}})
    found = plan_quantization(capture_graph(Masked(), torch.ones(2, 4)), settings)
    assert found.skipped["add"].startswith("unsupported")
    assert "add" not in found.tensors
    assert "softmax" in found.tensors


class Residual(nn.Module):
    """A residual stream between layer norms, with attention: as in every transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out, self.head = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return self.head(x + self.out(nn.functional.scaled_dot_product_attention(q, k, v)))


def test_a_product_is_rounded_only_where_an_int8_layer_reads_it() -> None:
    graph = capture_graph(Residual(), torch.randn(2, 5, 8))
    found = plan_quantization(graph)
    assert list(found.tensors) == ["layer_norm", "scaled_dot_product_attention"]  # what the two linear layers read
    assert found.skipped["add"] == "rule: float layers are before and behind it"
    assert found.skipped["scaled_dot_product_attention"] == "rule: scaled_dot_product_attention is computed in float by ort"
    asked = plan_quantization(graph, load_settings({"layer_settings": [{"match": "add", "skip_quantization": False}]}))
    assert set(asked.tensors) == {"input_0", "layer_norm", "scaled_dot_product_attention", "linear_1", "add"}


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_other_engines_multiply_attention_in_int8(target: str) -> None:
    graph = capture_graph(Residual(), torch.randn(2, 5, 8))
    found = plan_quantization(graph, load_settings({"deployment_settings": {"target_framework": target}}))
    assert "scaled_dot_product_attention" in found.quantized
    assert "linear" in found.tensors  # q, k and v, rounded where they are made
