"""The plan quantizes what it may, skips what it must, and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from export_models import LSTMClassifier, UNet
from hypothesis import HealthCheck, given, reject
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from models import GuideCNN, ResidualCNN, TokenModel
from torch import Tensor, nn

from lightning_cco import LayerQuantizationSettings, Settings, capture_graph, generate_default_settings, plan_quantization, quantize
from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.settings import TARGET_FRAMEWORKS, load_settings


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
    assert found.skipped["input_0"].startswith("its values are integers")
    assert "embedding" in found.quantized
    assert found.decisions["embedding"].weights_num_bits == 8
    assert found.skipped["layer_norm"] == "layer_norm is computed in float by ort"
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
    # relu is read by the float conv_1 but ends the INT8 group of conv; relu_1 is a clamp after a float layer: only its result is read in INT8.
    assert "relu" in found.tensors
    assert "relu_1" in found.tensors
    assert "conv_1" not in found.tensors
    assert {(b.source, b.destination, b.direction) for b in found.boundaries} >= {
        ("relu", "conv_1", "INT8 → float"),
        ("relu_1", "linear", "float → INT8"),
    }


def test_a_clamp_can_be_asked_for(cnn: LayerGraph) -> None:
    found = plan(cnn, {"match": "conv_1", "skip_quantization": True}, {"match": "relu_1", "skip_quantization": False})
    assert "conv_1" in found.tensors
    resolved = plan_quantization(cnn, found.resolved_settings())
    assert resolved.tensors == found.tensors
    assert "relu_1" in resolved.quantized


GRAPHS = {
    "cnn": lambda: capture_graph(GuideCNN(), GuideCNN.example()),
    "residual": lambda: capture_graph(ResidualCNN(), ResidualCNN.example()),
    "tokens": lambda: capture_graph(TokenModel(), TokenModel.example()),
    "lstm": lambda: capture_graph(LSTMClassifier(), torch.randint(0, 30, (2, 7))),
    "u_net": lambda: capture_graph(UNet(), torch.randn(1, 3, 32, 32)),
}


@pytest.fixture(scope="module")
def graphs() -> dict[str, LayerGraph]:
    return {name: make() for name, make in GRAPHS.items()}


@st.composite
def rules_for(draw: st.DrawFn, names: tuple[str, ...]) -> list[dict[str, object]]:
    bits = st.one_of(st.none(), st.integers(2, 8))
    rules = []
    for name in draw(st.lists(st.sampled_from(names), max_size=4, unique=True)):
        said = {
            "skip_quantization": draw(st.sampled_from([None, True, False])),
            "weights_num_bits": draw(bits),
            "activations_num_bits": draw(bits),
        }
        rules.append({"match": name, **{key: value for key, value in said.items() if value is not None}})
    return rules


@pytest.mark.filterwarnings("ignore:layer_settings:lightning_cco.CCOWarning")
@pytest.mark.parametrize("model", GRAPHS)
@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_resolved_recipe_can_be_fed_back(graphs: dict[str, LayerGraph], model: str, data: st.DataObject) -> None:
    """Whatever the rules, the suggestions, the bits, the tail and the engine: as a file and back, the plan is the same."""
    graph = graphs[model]
    recipe = {
        "layer_settings": data.draw(rules_for(graph.names)),
        "global_quantization_settings": {
            "weights_num_bits": data.draw(st.integers(2, 8)),
            "activations_num_bits": data.draw(st.integers(2, 8)),
            "skip_tail_quantization": data.draw(st.booleans()),
        },
        "deployment_settings": {"target_framework": data.draw(st.sampled_from(TARGET_FRAMEWORKS))},
    }
    try:
        found = plan_quantization(graph, load_settings(recipe), data.draw(st.lists(st.sampled_from(graph.names), max_size=2)))
    except CCOError:  # asked for the impossible
        reject()
    resolved = found.resolved_settings()
    again = plan_quantization(graph, load_settings(yaml.safe_load(yaml.safe_dump(resolved.to_dict()))))
    assert [rule.match for rule in resolved.layer_settings] == [name for name in graph.names if name not in graph.outputs]
    assert again.quantized == found.quantized
    assert again.tensors == found.tensors
    assert again.boundaries == found.boundaries
    assert [(d.weights_num_bits, d.activations_num_bits) for d in again.decisions.values()] == [
        (d.weights_num_bits, d.activations_num_bits) for d in found.decisions.values()
    ]
    assert again.resolved_settings() == resolved


def test_a_batch_norm_can_be_left_out_of_its_group(residual: LayerGraph) -> None:
    found = plan(residual, {"match": "batch_norm_1", "skip_quantization": True})
    assert found.skipped["batch_norm_1"].startswith("setting")
    assert "conv_1" in found.tensors  # the convolution is rounded at its own end
    assert "batch_norm_1" not in found.tensors  # the relu after it is computed in float, and its result is rounded
    assert residual.successors("batch_norm_1")[0] in found.tensors
    assert plan_quantization(residual, suggestions=["batch_norm_1"]).skipped["batch_norm_1"].startswith("suggestion")


def test_the_inner_container_wins_over_the_outer(residual: LayerGraph) -> None:
    rules = [{"match": "blocks", "weights_num_bits": 4}, {"match": "blocks.1", "weights_num_bits": 6}]
    for order in (rules, rules[::-1]):
        found = plan(residual, *order)
        assert [found.decisions[name].weights_num_bits for name in ("conv", "conv_1", "conv_3")] == [8, 4, 6]


def test_several_starts_and_destinations(residual: LayerGraph) -> None:
    found = plan(residual, {"match": "blocks.*.conv1", "skip_quantization": True, "skip_quantization_until": ["relu_3", "add_1"]})
    between = residual.between("conv_1", ["relu_3", "add_1"]) | residual.between("conv_3", ["relu_3", "add_1"])
    assert {name for name, reason in found.skipped.items() if reason.startswith("setting")} == between


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        pytest.param(
            {"match": "relu", "weights_num_bits": 4}, r"'relu' sets weights_num_bits: 4.*no layer there has weights.*'conv'", id="weights"
        ),
        pytest.param({"match": "max_pool", "activations_num_bits": 4}, r"only passes values on.*'relu_1'", id="activations"),
        pytest.param({"match": "linear_1", "weights_num_bits": 4}, r"'linear_1' stays in float \(tail", id="weights of the tail"),
        pytest.param({"match": "linear_1", "activations_num_bits": 4}, r"no INT8 layer reads the result", id="output of the tail"),
        pytest.param(
            {"match": "conv*", "weights_num_bits": 4, "skip_quantization": True}, r"'conv', 'conv_1' stay in float \(setting", id="skipped"
        ),
        pytest.param({"match": "*", "skip_quantization": True}, r"skips of '\*' no layer is quantized", id="everything"),
    ],
)
def test_bits_that_change_nothing_are_said(cnn: LayerGraph, rule: dict[str, object], message: str) -> None:
    with pytest.warns(CCOWarning, match=message):
        plan(cnn, rule)


@pytest.mark.parametrize(
    "rule",
    [
        {"match": "conv", "activations_num_bits": 4},  # of the group that it begins
        {"match": "*", "weights_num_bits": 4},
        {"match": "linear_1", "skip_quantization": False, "weights_num_bits": 4},
        {"match": "conv_1", "skip_quantization": True},
    ],
)
def test_rules_that_change_something_are_not(cnn: LayerGraph, rule: dict[str, object]) -> None:
    plan(cnn, rule)  # warnings are errors
    found = plan_quantization(cnn, {"layer_settings": [rule]}, suggestions=["conv"])
    plan_quantization(cnn, found.resolved_settings())


def test_suggestions_are_skipped_with_their_reason(cnn: LayerGraph) -> None:
    found = plan_quantization(cnn, suggestions=["conv_1"])
    assert found.skipped["conv_1"].startswith("suggestion")


@pytest.mark.parametrize("target", ["tensorrt", "trt"])
def test_tensorrt_takes_symmetric_activations(cnn: LayerGraph, target: str) -> None:
    found = plan_quantization(cnn, load_settings({"deployment_settings": {"target_framework": target}}))
    assert all(spec.symmetric for spec in found.tensors.values())


def test_unknown_layer_names_the_nearest(cnn: LayerGraph) -> None:
    with pytest.raises(CCOError, match=r"match: convv_1.*No layer name or module path is 'convv_1'.*Did you mean 'conv_1'"):
        plan(cnn, {"match": "convv_1", "skip_quantization": True})
    with pytest.raises(CCOError, match=r"match: conv\).*'linearr'.*Did you mean 'linear'"):
        plan(cnn, {"match": "conv", "skip_quantization": True, "skip_quantization_until": ["linearr"]})


def test_unreachable_destination(cnn: LayerGraph) -> None:
    with pytest.raises(
        CCOError, match=r"match: linear.*'conv' can't be reached from 'linear'.*write 'linear' as the destination of 'conv'"
    ):
        plan(cnn, {"match": "linear", "skip_quantization": True, "skip_quantization_until": ["conv"]})


def test_contradicting_rules(cnn: LayerGraph) -> None:
    with pytest.raises(CCOError, match=r"contradict.*conv_1.*Remove one"):
        plan(cnn, {"match": "conv_*", "skip_quantization": True}, {"match": "con*_1", "skip_quantization": False})


def test_quantizing_an_index_input_is_refused(tokens: LayerGraph) -> None:
    with pytest.raises(CCOError, match=r"input_0.*integers.*embedding"):
        plan(tokens, {"match": "input_0", "skip_quantization": False})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("dropout", r"dropout.*not part of the deployed model.*Remove", id="dropout"),
        pytest.param("output_0", r"only marks where the model returns.*'linear_1'", id="output"),
    ],
)
def test_asking_for_what_has_no_int8_kernel(cnn: LayerGraph, name: str, message: str) -> None:
    with pytest.raises(CCOError, match=message):
        plan(cnn, {"match": name, "skip_quantization": False})


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
    assert found.skipped["add"].startswith("holds the huge values of a mask")
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
    assert found.skipped["add"] == "the layers before and after it run in float"
    assert found.skipped["scaled_dot_product_attention"] == "scaled_dot_product_attention is computed in float by ort"
    asked = plan_quantization(graph, load_settings({"layer_settings": [{"match": "add", "skip_quantization": False}]}))
    assert set(asked.tensors) == {"input_0", "layer_norm", "scaled_dot_product_attention", "linear_1", "add"}


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
@pytest.mark.parametrize("asked", [False, True])
def test_attention_in_one_call_is_in_int8_where_it_is_asked_for_alone(target: str, asked: bool) -> None:
    graph = capture_graph(Residual(), torch.randn(2, 5, 8))
    rules = [{"match": "scaled_dot_product_attention", "skip_quantization": False}] if asked else []
    found = plan_quantization(graph, load_settings({"deployment_settings": {"target_framework": target}, "layer_settings": rules}))
    assert ("scaled_dot_product_attention" in found.quantized) == asked
    assert ("linear" in found.tensors) == asked  # q, k and v, rounded where they are made


class Checked(nn.Module):
    """Two heads; the values of the first one's result are looked at before it is returned."""

    def __init__(self, look: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.look, self.first, self.one, self.other = look, nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> tuple[Any, Tensor]:
        x = torch.relu(self.first(x))
        return self.look(self.one(x)), self.other(x)


def _finite(x: Tensor) -> Tensor:
    assert torch.isfinite(x).all()
    return x


def _softmax_too(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x.softmax(1)


@pytest.mark.parametrize(
    "look",
    [_finite, _softmax_too, lambda x: (x, x.argmax(1)), lambda x: torch.distributions.Categorical(logits=x)],
    ids=["assertion", "softmax", "argmax", "distribution"],
)
def test_a_look_at_an_output_does_not_take_it_out_of_the_tail(look: Callable[[Tensor], Any]) -> None:
    quantized = quantize(Checked(look), None, (torch.randn(4, 8),))
    assert {layer.name for layer in quantized.graph if layer.path in ("one", "other")} <= set(quantized.plan.skipped)
    assert "linear" in quantized.plan.quantized
