"""Suggestions name the layers above a threshold, worst first, as recipe lines that merge as they are."""

from __future__ import annotations

import math

import pytest
import yaml
from models import GuideCNN
from omegaconf import OmegaConf

from lightning_cco import Settings, capture_graph, load_settings, plan_quantization
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.sensitivity import LayerSensitivity, SensitivityReport
from lightning_cco.suggestions import merge_suggestions, suggest_skips, suggestions_yaml


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
    assert "8-bit weights" in found[2].reason


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
            {"match": "encoder.*", "weights_num_bits": 5},
            {"match": "relu", "skip_quantization": True, "skip_quantization_until": ["linear"]},
        ],
    }
    settings = load_settings(recipe)
    found = suggest_skips(report(conv=11_000.0), plan, settings)
    merged = load_settings(OmegaConf.merge(recipe, OmegaConf.create(suggestions_yaml(found, settings))))
    assert merged == merge_suggestions(settings, found)
    assert [rule.match for rule in merged.layer_settings] == ["encoder.*", "relu", "conv"]
    assert merged.global_quantization_settings.weights_num_bits == 4
    assert merge_suggestions(merged, found) == merged
