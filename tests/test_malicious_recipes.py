"""Recipes that could hang, exhaust memory, hide something or give a secret away are refused at once, in few words that name the key."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from torch import nn, randn

from lightning_cco import CCOError, LayerQuantizationSettings, load_settings, quantize
from lightning_cco.settings import GlobalQuantizationSettings, MonitoringSettings, TrainingSettings


def bomb(lines: int) -> str:
    return "a0: &a0 [x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, lines))


def references(lines: int) -> str:
    """Text of text, twice as long with each line."""
    return "monitoring_settings:\n  output_dir: ${v40}\nv0: x\n" + "".join(f"v{i}: ${{v{i - 1}}}${{v{i - 1}}}\n" for i in range(1, lines))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(9), "aliases expand to more"),
        (bomb(9) + "x: ${y}", "aliases expand to more"),
        ("layer_settings: &a [*a]", r"layer_settings.*\*a"),
        ("training_settings: &a {stats_steps: *a}", "training_settings.stats_steps"),
        ("training_settings: " + "[" * 100_000, r"training_settings.*20 deep"),
        ("training_settings: " + "{a: " * 50_000, r"training_settings.*20 deep"),
        ("training_settings: {stats_steps: 3}\ntraining_settings: {stats_steps: 4}", "'training_settings' comes twice"),
        ("training_settings: {stats_steps: 3, stats_steps: 3}", "training_settings.stats_steps.*comes twice"),
        ("layer_settings: [{match: a}, {match: b, match: c}]", r"layer_settings\[1\].match.*comes twice"),
        ("a: 1\n---\nb: 1", "one document"),
        ("training_settings: !!python/object/apply:os.getcwd []", "training_settings.*tag"),
        ("training_settings: {stats_steps: " + "9" * 5000 + "}", "stats_steps.*4,096"),
        ("training_settings: {stats_steps: " + "9" * 4000 + "}", "stats_steps.*million"),
        ("layer_settings: [{match: '" + "z" * 100_000 + "'}]", "match.*4,096"),
        ("layer_settings: [{match: '" + "*a" * 1000 + "'}]", "20 stars"),
        (references(60), "expand to more than"),
        ("monitoring_settings: {output_dir: '${monitoring_settings.output_dir}'}", "can't be resolved"),
        ("training_settings:\n  stats_steps: 1:30", r"line 2, training_settings\.stats_steps: 1:30 is 90 to YAML \(.*base of 60"),
        ("training_settings: {averaging_constant: 0:0.5}", r"training_settings\.averaging_constant: 0:0\.5 is 0\.5 to YAML"),
        ("training_settings: {stats_steps: 010}", r"training_settings\.stats_steps: 010 is 8 to YAML"),
        ("training_settings: {stats_steps: !!int 010}", r"training_settings\.stats_steps: 010 is 8 to YAML"),
        ("training_settings: {stats_steps: 1e3}", r"expected a whole number, got str: '1e3'\. Write 1000"),
        ("layer_settings: {1:30: {skip_quantization: true}}", "1:30 is 90 to YAML.*in quotes"),
        ("layer_settings: [{match: 2024-01-01, skip_quantization: true}]", r"match: 2024-01-01 is a date to YAML. Write it in quotes"),
        (
            "layer_settings: [{match: off, skip_quantization: true}]",
            "match: expected text, got bool: False. YAML reads yes, no, on and off",
        ),
        ("layer_settings: [{match: 1, skip_quantization: true}]", "match: expected text, got int: 1. Write a name in quotes"),
        ("layer_settings: [{match: a, skip_quantization_until: [no]}]", "until: expected a list of names.*in quotes"),
        ("distillation_settings: {on: layers, true: outputs}", "'true' comes twice"),
        ('monitoring_settings: {output_dir: "a\\0b"}', "output_dir.*path of a folder"),
    ],
)
def test_a_file_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(CCOError, match=said) as found:
        load_settings(tmp_path / "recipe.yaml")
    assert len(str(found.value)) < 1000


@pytest.mark.parametrize(
    ("written", "steps"), [("1_000", 1000), ("0x10", 16), ("1.0e+3", 1000), ("+30", 30), ("007", 7), ("!!int '30'", 30)]
)
def test_numbers_that_yaml_reads_as_they_are_meant(written: str, steps: int, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"training_settings: {{stats_steps: {written}}}")
    assert load_settings(tmp_path / "recipe.yaml").training_settings.stats_steps == steps


@pytest.mark.parametrize("name", ["1:30", "010", "2024-01-01", "off", "1"])
def test_names_in_quotes_are_names(name: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"layer_settings: [{{match: '{name}', skip_quantization: true}}]")
    assert load_settings(tmp_path / "recipe.yaml").layer_settings[0].match == name


def around() -> Any:
    itself: list[Any] = []
    itself.append(itself)
    return itself


@pytest.mark.parametrize(
    "recipe",
    [
        {"training_settings": {"stats_steps": around()}},
        {"layer_settings": around()},
        {"layer_settings": [{"match": "a", "skip_quantization_until": around()}]},
        {"training_settings": {"stats_steps": 10**5000}},
        {"training_settings": ["x" * 10**6] * 1000},
        {"x" * 10**6: 1},
        {"deployment_settings": {"target_framework": "x" * 10**6}},
        {"layer_settings": iter(lambda: {"match": "conv"}, None)},  # never ends
    ],
)
def test_python_values_are_shown_in_few_words(recipe: dict[str, Any]) -> None:
    with pytest.raises(CCOError) as found:
        load_settings(recipe)
    assert len(str(found.value)) < 1000


@pytest.mark.parametrize("hydra", [False, True])
@pytest.mark.parametrize(
    "recipe",
    [
        {"global_quantization_settings": {"weights_num_bits": "${oc.env:TOKEN}"}},
        {"training_settings": {"range_estimator": "${oc.env:TOKEN}"}},
        {"layer_settings": [{"match": "${oc.env:TOKEN}", "skip_quantization_downstream": True}]},
        {"layer_settings": [{"match": "conv", "weights_num_bits": "x${oc.env:TOKEN}"}]},
        {"layer_settings": [{"match": "${oc.env:TOKEN}", "skip_quantization": True}]},
    ],
)
def test_what_an_interpolation_stands_for_is_not_shown(
    recipe: dict[str, Any], hydra: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "hunter2")
    OmegaConf.save(OmegaConf.create(recipe), tmp_path / "recipe.yaml")
    with pytest.raises(CCOError) as found:  # in reading, or since no layer has that name
        quantize(nn.Sequential(nn.Linear(2, 2)), OmegaConf.create(recipe) if hydra else str(tmp_path / "recipe.yaml"), (randn(1, 2),))
    assert "hunter2" not in str(found.value)
    assert "${oc.env:TOKEN}" in str(found.value)


def test_resolved_text_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYER", "linear")
    settings = load_settings(OmegaConf.create({"layer_settings": [{"match": "${oc.env:LAYER}", "skip_quantization": True}]}))
    for again in (settings, copy.deepcopy(settings), pickle.loads(pickle.dumps(settings)), load_settings(settings)):
        assert again.to_dict()["layer_settings"] == [{"match": "linear", "skip_quantization": True}]
        assert type(again.to_dict()["layer_settings"][0]["match"]) is str
    settings.save(tmp_path / "saved.yaml")
    assert load_settings(tmp_path / "saved.yaml") == settings


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (GlobalQuantizationSettings, "weights_num_bits", 99),
        (GlobalQuantizationSettings, "activations_num_bits", 1),
        (GlobalQuantizationSettings, "quantization_sensitivity_threshold", float("nan")),
        (LayerQuantizationSettings, "weights_num_bits", 0),
        (TrainingSettings, "stats_steps", 0),
        (TrainingSettings, "averaging_constant", float("nan")),
        (MonitoringSettings, "sensitivity_batches", -1),
    ],
)
def test_a_number_out_of_bounds_is_refused_where_it_is_written(kind: type, key: str, value: float) -> None:
    with pytest.raises(CCOError, match=rf"{key}: expected .*, got .*"):
        kind(**{key: value})
    made = kind()
    with pytest.raises(CCOError, match=rf"{key}: expected .*, got .*"):
        setattr(made, key, value)
    assert made == kind()


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text")

    __str__ = __repr__


@pytest.mark.parametrize("recipe", [{Unprintable(): 1}, {"training_settings": {Unprintable(): 1}}, {"training_settings": Unprintable()}])
def test_what_has_no_text_is_named_by_its_type(recipe: Any) -> None:
    with pytest.raises(CCOError, match="Unprintable"):
        load_settings(recipe)
