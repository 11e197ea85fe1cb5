"""Suggestions name the layers above a threshold, worst first, as recipe lines that merge as they are."""

from __future__ import annotations

import math

import pytest
import torch
import yaml
from models import GuideCNN
from omegaconf import OmegaConf
from torch import nn

from lightning_cco import Settings, capture_graph, load_settings, plan_quantization, quantize
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.sensitivity import LayerSensitivity, SensitivityReport
from lightning_cco.settings import LayerRule
from lightning_cco.suggestions import Suggestion, merge_suggestions, suggest_skips, suggestions_yaml


@pytest.fixture(scope="module")
def plan() -> QuantizationPlan:
    return plan_quantization(capture_graph(GuideCNN(), GuideCNN.example()))


def report(**values: float) -> SensitivityReport:
    return SensitivityReport({name: LayerSensitivity(name, qs, qs / 1e5, 10.0) for name, qs in values.items()}, {}, 1)


def test_worst_first_and_only_quantized_layers(plan: QuantizationPlan) -> None:
    measured = report(conv=11_000.0, conv_1=math.nan, linear=9_999.0, relu=20_000.0, linear_1=1e9)
    found = suggest_skips(measured, plan, Settings())
    assert [suggestion.name for suggestion in found] == ["conv_1", "relu", "conv"]
    assert "11,000 is above 10,000" in found[2].reason
    assert "(rounding the weights to 8 bits)" in found[2].reason


def test_relative_threshold(plan: QuantizationPlan) -> None:
    settings = load_settings({"global_quantization_settings": {"quantization_sensitivity_relative_threshold": 0.1}})
    found = suggest_skips(report(conv=9_000.0, linear=11_000.0), plan, settings)
    assert [suggestion.name for suggestion in found] == ["linear"]
    settings.global_quantization_settings.quantization_sensitivity_threshold = None
    assert "relative" in suggest_skips(report(linear=10_500.0), plan, settings)[0].reason


def test_nothing_to_suggest(plan: QuantizationPlan) -> None:
    assert suggest_skips(report(conv=1.0), plan, Settings()) == []
    assert yaml.safe_load(suggestions_yaml([])) == {"layer_settings": []}


def test_the_yaml_merges_over_the_recipe_as_it_is(plan: QuantizationPlan) -> None:
    recipe = {
        "global_quantization_settings": {"weights_num_bits": 4},
        "layer_settings": [
            {"match": "fc*", "weights_num_bits": 5},
            {"match": "relu", "skip_quantization": True, "skip_quantization_until": ["linear"]},
        ],
    }
    settings = load_settings(recipe)
    found = suggest_skips(report(conv=11_000.0), plan, settings)
    merged = load_settings(OmegaConf.merge(recipe, OmegaConf.create(suggestions_yaml(found, settings))))
    assert merged == merge_suggestions(settings, found)
    assert [rule.match for rule in merged.layer_settings] == ["fc*", "relu", "conv"]
    assert merged.global_quantization_settings.weights_num_bits == 4
    assert merge_suggestions(merged, found) == merged


def test_what_was_skipped_by_itself_stays_in_the_yaml(plan: QuantizationPlan) -> None:
    text = suggestions_yaml([], load_settings({"layer_settings": [{"match": "conv", "weights_num_bits": 4}]}), ["relu", "linear"])
    rules = load_settings(yaml.safe_load(text)).layer_settings
    assert [(rule.match, rule.skip_quantization) for rule in rules] == [("conv", None), ("relu", True), ("linear", True)]


def test_an_output_that_resists_names_what_rounds_it(plan: QuantizationPlan) -> None:
    """max_pool and flatten only pass relu_1 on: the reader of its output is the linear layer after them."""
    found = suggest_skips(report(relu_1=20_000.0, conv=12_000.0), plan, Settings())
    assert [(s.name, s.qs) for s in found] == [("relu_1", 20_000.0), ("conv_1", 20_000.0), ("linear", 20_000.0), ("conv", 12_000.0)]
    assert "fused with 'relu_1'" in found[1].reason
    assert "reads the output of 'relu_1'" in found[2].reason


def test_an_input_is_suggested_alone(plan: QuantizationPlan) -> None:
    assert [s.name for s in suggest_skips(report(input_0=20_000.0), plan, Settings())] == ["input_0"]


class Spread(nn.Module):
    """Features whose sizes differ by orders of magnitude, and so do the weights that read them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(20, 32), nn.Linear(32, 32), nn.Linear(32, 16)
        with torch.no_grad():
            self.first.weight /= torch.logspace(1, -5, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def test_a_layer_whose_rounding_leaves_nothing_of_what_differs_is_suggested_by_default_and_its_skip_helps() -> None:
    torch.manual_seed(0)
    model, x = Spread().eval(), torch.rand(64, 20) * torch.logspace(1, -5, 20)

    def error_of_what_varies(rules: list[LayerRule]) -> float:
        quantized = quantize(model, Settings(layer_settings=rules), (x,))
        quantized.calibrate([x])
        suggested[:] = suggest_skips(quantized.sensitivity([x]), quantized.plan, quantized.settings)
        with torch.no_grad():
            got = model(x)
        quantized.remove()
        with torch.no_grad():
            expected = model(x)
        varying = expected - expected.mean(0)
        return float((got - got.mean(0) - varying).norm() / varying.norm())

    suggested: list[Suggestion] = []
    before = error_of_what_varies([])
    assert [suggestion.name for suggestion in suggested] == ["linear"]
    assert "varies between samples" in suggested[0].reason
    after = error_of_what_varies([LayerRule(match="linear", skip_quantization=True)])
    assert after < 0.1 * before
    assert not suggested


def test_a_healthy_network_gets_no_suggestion() -> None:
    torch.manual_seed(0)
    model, x = GuideCNN().eval(), GuideCNN.example()
    quantized = quantize(model, Settings(), (x,))
    quantized.calibrate([x])
    assert suggest_skips(quantized.sensitivity([x]), quantized.plan, quantized.settings) == []


class Uneven(nn.Module):
    """Features of which one column is a thousand times as large as the others, or all of which are shifted; the layer after makes up for it."""

    def __init__(self, factor: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        with torch.no_grad():
            self.b.weight[5] *= factor
            self.c.weight[:, 5] /= factor
            self.b.bias += shift
            self.c.bias -= self.c.weight.sum(1) * shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))


@pytest.mark.parametrize(("factor", "shift"), [(1000.0, 0.0), (1.0, 100.0), (1.0, 0.0)], ids=["outlier", "offset", "healthy"])
def test_what_a_coarse_scale_loses_is_suggested_and_its_skip_helps(factor: float, shift: float) -> None:
    """Of a column that is much larger than the others, and of what varies beside a large constant."""
    torch.manual_seed(0)
    model, x = Uneven(factor, shift).eval(), torch.randn(128, 16)
    with torch.no_grad():
        expected = model(x)

    def measured(names: list[str]) -> tuple[float, list[str]]:
        quantized = quantize(model, Settings(layer_settings=[LayerRule(match=name, skip_quantization=True) for name in names]), (x,))
        quantized.calibrate([x])
        found = [suggestion.name for suggestion in suggest_skips(quantized.sensitivity([x]), quantized.plan, quantized.settings)]
        with torch.no_grad():
            got = model(x)
        quantized.remove()
        varying = expected - expected.mean(0)
        return float((got - got.mean(0) - varying).norm() / varying.norm()), found

    before, names = measured([])
    if factor == 1 and shift == 0:
        assert names == []
        return
    assert {"relu_1", "linear_1", "linear_2"} == set(names)
    after, rest = measured(names)
    assert after < 0.1 * before
    assert rest == []
