"""Recipes are read in every form, and what is wrong with one is said in words that help."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import lightning_cco as cc
from lightning_cco._recipes import shipped_recipes
from lightning_cco.settings import (
    BitsStage,
    BudgetSettings,
    DeploymentSettings,
    GlobalQuantizationSettings,
    LayerRule,
    MonitoringSettings,
    TrainingSettings,
    load_settings,
)

BITS = st.one_of(st.none(), st.integers(2, 8))
NAMES = st.from_regex(r"[a-z][a-z_.]{0,12}[a-z0-9*]", fullmatch=True)
RULES = st.one_of(
    st.builds(
        LayerRule, match=NAMES, skip_quantization=st.sampled_from([None, True, False]), weights_num_bits=BITS, activations_num_bits=BITS
    ),
    st.builds(LayerRule, match=NAMES, skip_quantization=st.just(True), skip_quantization_until=st.lists(NAMES, max_size=3)),
    st.builds(LayerRule, match=NAMES, skip_quantization=st.just(True), skip_quantization_downstream=st.booleans()),
)


@given(
    rules=st.lists(RULES, max_size=5),
    weights=st.integers(2, 8),
    threshold=st.one_of(st.none(), st.floats(0, 1e6)),
    steps=st.integers(1, 99),
)
def test_settings_survive_yaml(rules: list[LayerRule], weights: int, threshold: float | None, steps: int) -> None:
    settings = cc.Settings(layer_settings=rules)
    settings.global_quantization_settings.weights_num_bits = weights
    settings.global_quantization_settings.quantization_sensitivity_threshold = threshold
    settings.training_settings.stats_steps = steps
    text = yaml.safe_dump(settings.to_dict())
    assert load_settings(yaml.safe_load(text)) == settings
    assert load_settings(settings) == settings
    assert load_settings(settings) is not settings


def test_every_form_says_the_same(tmp_path: Path) -> None:
    recipe = {
        "global_quantization_settings": {"weights_num_bits": 4},
        "layer_settings": [{"match": "a", "skip_quantization": True, "skip_quantization_until": ["b"]}],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    expected = cc.generate_default_settings()
    expected.global_quantization_settings.weights_num_bits = 4
    expected.set_quantization_settings_for_layer("a", cc.LayerQuantizationSettings(skip_quantization=True, skip_quantization_until=["b"]))
    for form in (recipe, OmegaConf.create(recipe), str(path), path, expected):
        assert load_settings(form) == expected
    assert cc.Settings.load_from_path(path) == expected
    expected.save(tmp_path / "again.yaml")
    assert load_settings(tmp_path / "again.yaml") == expected


def test_clikas_mapping_of_layers_and_nulls() -> None:
    settings = load_settings(
        {
            "global_quantization_settings": {"method": "qat", "skip_tail_quantization": None, "quantization_sensitivity_threshold": None},
            "layer_settings": {"conv": {"quantization_settings": {"weights_num_bits": 4}}, "linear": {"skip_quantization": True}},
            "deployment_settings": {"target_framework": "ov"},
        }
    )
    assert settings.layer_settings == [LayerRule(match="conv", weights_num_bits=4), LayerRule(match="linear", skip_quantization=True)]
    assert settings.global_quantization_settings.skip_tail_quantization is True
    assert settings.global_quantization_settings.quantization_sensitivity_threshold is None
    assert settings.deployment_settings.target_framework == "openvino"


def test_saying_something_of_a_layer_again_replaces_it() -> None:
    settings = cc.generate_default_settings()
    settings.set_quantization_settings_for_layer("conv", cc.LayerQuantizationSettings(weights_num_bits=4))
    settings.set_quantization_settings_for_layer("conv", cc.LayerQuantizationSettings(skip_quantization=True))
    assert settings.layer_settings == [LayerRule(match="conv", skip_quantization=True)]


def test_values_as_yaml_and_the_environment_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITS", "4")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "global_quantization_settings: {weights_num_bits: '${oc.env:BITS}', quantization_sensitivity_threshold: 1e4}\n"
        "monitoring_settings: {draw_graph: 'False'}\n"
    )
    settings = load_settings(path)
    assert settings.global_quantization_settings.weights_num_bits == 4
    assert settings.global_quantization_settings.quantization_sensitivity_threshold == 10_000.0  # to YAML, 1e4 is text
    assert settings.monitoring_settings.draw_graph is False


def test_copies_and_pickles() -> None:
    settings = load_settings("w4a8")
    assert copy.deepcopy(settings) == pickle.loads(pickle.dumps(settings)) == settings


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_valid(name: str) -> None:
    assert load_settings(name).global_quantization_settings.weights_num_bits == int(name[1])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        pytest.param({"global_quantization_setings": {}}, r"unknown key.*global_quantization_settings", id="unknown_section"),
        pytest.param({"training_settings": {"stat_steps": 3}}, r"training_settings\.stat_steps.*stats_steps", id="unknown_key"),
        pytest.param(
            {"layer_settings": [{"match": "a", "skip": True}]}, r"layer_settings\[0\]\.skip.*skip_quantization", id="unknown_rule_key"
        ),
        pytest.param({"training_settings": {"num_epochs": 3}}, r"max_epochs", id="num_epochs"),
        pytest.param({"training_settings": {"steps_per_epoch": 3}}, r"limit_train_batches", id="steps_per_epoch"),
        pytest.param({"distributed_training_settings": {"multi_gpu": True}}, r"Trainer", id="distributed"),
        pytest.param({"training_settings": {"stats_steps": "many"}}, r"stats_steps: expected a whole number, got str: 'many'", id="type"),
        pytest.param({"training_settings": {"stats_steps": 7.5}}, r"whole number.*7\.5", id="fraction"),
        pytest.param({"training_settings": {"stats_steps": float("inf")}}, r"whole number.*inf", id="infinite"),
        pytest.param({"training_settings": {"skip_initial_evaluation": 1}}, r"expected true or false, got int", id="int_for_bool"),
        pytest.param({"training_settings": {"freeze_ranges_at_step": "x"}}, r"whole number or null", id="optional"),
        pytest.param({"monitoring_settings": {"sensitivity_modes": "local"}}, r"expected a list of names", id="text_for_list"),
        pytest.param({"monitoring_settings": {"output_dir": 3}}, r"expected text or null, got int", id="int_for_text"),
        pytest.param({"global_quantization_settings": {"weights_num_bits": True}}, r"weights_num_bits.*got bool", id="bool_for_int"),
        pytest.param({"global_quantization_settings": {"weights_num_bits": 1}}, r"2 to 8 bits", id="bits_low"),
        pytest.param({"layer_settings": [{"match": "a", "activations_num_bits": 9}]}, r"match: a.*2 to 8 bits", id="bits_high"),
        pytest.param({"global_quantization_settings": {"method": "ptq"}}, r"qat", id="method"),
        pytest.param({"global_quantization_settings": {"quantization_sensitivity_threshold": -1}}, r"at least 0", id="threshold"),
        pytest.param({"training_settings": {"stats_steps": 0}}, r"at least 1", id="steps"),
        pytest.param({"training_settings": {"range_estimator": "minmax"}}, r"min_max", id="estimator"),
        pytest.param({"training_settings": {"percentile": 40}}, r"\(50, 100\]", id="percentile"),
        pytest.param({"training_settings": {"averaging_constant": 0}}, r"\(0, 1\]", id="averaging"),
        pytest.param({"training_settings": {"freeze_ranges_at_step": -2}}, r"at least 0", id="freeze"),
        pytest.param({"monitoring_settings": {"sensitivity_modes": ["locally"]}}, r"local", id="mode"),
        pytest.param({"monitoring_settings": {"sensitivity_modes": []}}, r"at least one", id="no_mode"),
        pytest.param({"monitoring_settings": {"sensitivity_batches": 0}}, r"at least 1", id="batches"),
        pytest.param({"deployment_settings": {"target_framework": "openvin"}}, r"openvino", id="target"),
        pytest.param({"layer_settings": [{"skip_quantization": True}]}, r"`match` is missing", id="no_match"),
        pytest.param({"layer_settings": [{"match": "a", "skip_quantization_until": ["b"]}]}, r"Add skip_quantization: true", id="until"),
        pytest.param(
            {"layer_settings": [{"match": "a", "skip_quantization_downstream": True}]}, r"Add skip_quantization: true", id="downstream"
        ),
        pytest.param(
            {
                "layer_settings": [
                    {"match": "a", "skip_quantization": True, "skip_quantization_until": ["b"], "skip_quantization_downstream": True}
                ]
            },
            r"contradict",
            id="until_and_downstream",
        ),
        pytest.param({"layer_settings": "conv"}, r"list of rules", id="rules_text"),
        pytest.param({"layer_settings": ["conv"]}, r"layer_settings\[0\].*mapping", id="rule_text"),
        pytest.param({"training_settings": 3}, r"expected a mapping", id="section_number"),
        pytest.param([1], r"Expected a recipe.*got list", id="list"),
        pytest.param("w8a9", r"Did you mean 'w8a8'", id="name"),
        pytest.param("nowhere/recipe.yaml", r"not a file", id="path"),
    ],
)
def test_what_is_wrong_is_said(recipe: Any, message: str) -> None:
    with pytest.raises(cc.CCOError, match=message):
        load_settings(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "holds nothing", id="empty"),
        pytest.param("- a\n- b", "holds a list", id="list"),
        pytest.param("a: [1", "not valid YAML", id="broken"),
        pytest.param("training_settings: {stats_steps: '${nowhere}'}", "not valid YAML", id="interpolation"),
    ],
)
def test_files_that_are_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(cc.CCOError, match=message):
        cc.Settings.load_from_path(path)


def test_changing_settings_in_python_is_checked_at_use() -> None:
    settings = cc.generate_default_settings()
    with pytest.raises(cc.CCOError, match="2 to 8 bits"):
        settings.global_quantization_settings.activations_num_bits = 16
    settings.monitoring_settings.sensitivity_modes.append("global")
    with pytest.raises(cc.CCOError, match="sensitivity_modes"):
        load_settings(settings)
    with pytest.raises(cc.CCOError, match="Add skip_quantization: true"):
        settings.set_quantization_settings_for_layer("a", cc.LayerQuantizationSettings(skip_quantization_until=["b"]))
    with pytest.raises(cc.CCOError, match="LayerQuantizationSettings"):
        settings.set_quantization_settings_for_layer("a", {"skip_quantization": True})


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainingSettings, {"range_estimator": "minmax"}, r"TrainingSettings\.range_estimator: expected one of .*, got 'minmax'.*min_max"),
        (MonitoringSettings, {"sensitivity_modes": []}, r"at least one of"),
        (MonitoringSettings, {"output_dir": "a\0b"}, r"the path of a folder"),
        (DeploymentSettings, {"target_framework": "openvin"}, r"DeploymentSettings\.target_framework: .*'openvino'"),
        (LayerRule, {"skip_quantization": True}, r"LayerRule: `match` is missing"),
        (LayerRule, {"match": "a", "skip_quantization_until": ["b"]}, r"LayerRule \(match: a\): .*Add skip_quantization: true"),
        (
            LayerRule,
            {"match": "a", "skip_quantization_until": 3},
            r"LayerRule\.skip_quantization_until: expected a list of names, got int: 3",
        ),
        (LayerRule, {"match": "a", "weight_only": np.ones(2)}, r"expected true or false or null, got ndarray"),
        (
            GlobalQuantizationSettings,
            {"skip_tail_quantization": "no"},
            r"skip_tail_quantization: expected true or false, got str: 'no'",
        ),
        (GlobalQuantizationSettings, {"weights_num_bits": None}, r"weights_num_bits: expected a whole number, got NoneType"),
        (GlobalQuantizationSettings, {"weights_num_bits": "many"}, r"expected a whole number, got str: 'many'"),
        (BudgetSettings, {"size": [0.2]}, r"BudgetSettings\.size: expected a number or null, got list: \[0.2\]"),
        (BitsStage, {"at_step": "x" * 10**6, "weights_num_bits": 4}, r"^.{,200}$"),
        (TrainingSettings, {"stages": [3]}, r"a list of stages"),
        (cc.Settings, {"training_settings": 99}, r"training_settings: expected a mapping, got int: 99"),
        (cc.Settings, {"layer_settings": [99]}, r"layer_settings\[0\]: expected a mapping, got int"),
        (LayerRule, {"match": "*" * 30}, r"at most 4,096 characters and 20 stars"),
    ],
)
def test_the_dataclasses_refuse_what_a_recipe_may_not_say(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(cc.CCOError, match=message):
        kind(**values)


def test_a_setting_that_is_not_there_can_t_be_written_to() -> None:
    settings = cc.Settings()
    with pytest.raises(cc.CCOError, match=r"weight_num_bits: there is no such setting. Did you mean 'weights_num_bits'"):
        settings.global_quantization_settings.weight_num_bits = 4
    with pytest.raises(cc.CCOError, match=r"no such section. Did you mean 'training_settings'"):
        settings.trainings_settings = TrainingSettings()


def test_what_says_the_same_is_converted_where_it_is_written() -> None:
    section = TrainingSettings(stats_steps=np.int64(3), percentile=99)
    assert (section.stats_steps, type(section.stats_steps), section.percentile) == (3, int, 99.0)
    assert cc.Settings(training_settings={"stats_steps": "4"}).training_settings == TrainingSettings(stats_steps=4)
    own = TrainingSettings()
    assert cc.Settings(training_settings=own).training_settings is own


def test_an_engine_by_another_of_its_names() -> None:
    assert [DeploymentSettings(target_framework=name).target_framework for name in ("OV", "trt", "onnxruntime")] == [
        "openvino",
        "tensorrt",
        "ort",
    ]
