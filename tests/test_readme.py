"""What the README says is so: its code runs, its tables name what there is."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml
from models import ResidualCNN

import lightning_cco as cc
from lightning_cco._recipes import _TRAINER_OWNS, shipped_recipes
from lightning_cco.settings import LayerRule

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a heading."""
    return re.split(r"^## ", README.partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def rows(text: str) -> list[list[str]]:
    """Cells of each row of the Markdown tables in a text."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_examples_of_the_guide_run() -> None:
    [code] = blocks(section("Skipping layers"), "python")
    found: dict[str, object] = {}
    exec(code, found)
    graph = cc.capture_graph(ResidualCNN(), ResidualCNN.example())
    plan = cc.plan_quantization(graph, found["settings"])
    assert {name for name, reason in plan.skipped.items() if reason.startswith("setting")} == {
        "input_0",
        "adaptive_avg_pool",
        "flatten",
        "linear",
    }


def test_the_yaml_is_a_recipe() -> None:
    [text] = blocks(section("Skipping layers"), "yaml")
    assert [rule.match for rule in cc.load_settings(yaml.safe_load(text)).layer_settings] == ["adaptive_avg_pool", "encoder.*.attn"]


def test_the_code_that_runs_the_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    [code] = blocks(section("The INT8 file"), "python")
    quantized = cc.quantize(ResidualCNN().eval(), None, (ResidualCNN.example(),))
    quantized.calibrate([ResidualCNN.example()])
    monkeypatch.chdir(tmp_path)
    quantized.export("model_int8.onnx")
    images = ResidualCNN.example()[:1]
    found: dict[str, object] = {"images": images.numpy()}
    exec(code, found)
    assert found["scores"].shape == quantized.model(images).shape  # type: ignore[attr-defined]


def test_the_first_block_is_three_lines_of_the_public_interface() -> None:
    lines = blocks(README, "python")[0].splitlines()
    assert len(lines) == 3
    assert "CCOCallback" in lines[0]
    assert "export" in lines[2]
    assert callable(cc.CCOCallback.export)


def test_the_settings_table_names_every_setting_and_its_default() -> None:
    defaults, said, current = cc.Settings().to_dict(), {}, ""
    for key, default, *_ in rows(section("Settings")):
        if key.startswith("**"):
            current = key.strip("*")
            said[current] = default
        for name in re.findall(r"`(\w+)`", key):
            said[f"{current}.{name}"] = default
    for group, values in defaults.items():
        if group == "layer_settings":
            assert said[group] == "[]"
            continue
        for name, value in values.items():
            assert yaml.safe_load(said[f"{group}.{name}"]) == value, name
    assert len(said) == len(defaults) + sum(len(values) for values in defaults.values() if isinstance(values, dict))
    [rule] = [row for row in rows(section("Settings")) if row[0] == "**layer_settings**"]
    assert {field.name for field in dataclasses.fields(LayerRule)} <= set(re.findall(r"`(\w+)`", rule[2]))


def test_every_recipe_and_script_is_listed() -> None:
    names = {name for row in rows(section("Recipes")) for name in re.findall(r"`([\w.]+)`", row[0])}
    scripts = {path.name for path in (ROOT / "recipes").glob("*.py")} - {"digits.py"}  # the demo's model and data
    assert names == set(shipped_recipes()) | scripts


def test_clikas_settings_map_to_what_there_is() -> None:
    trainer = inspect.signature(pl.Trainer.__init__).parameters
    checkpoint = inspect.signature(pl.callbacks.ModelCheckpoint.__init__).parameters
    settings = cc.Settings().to_dict()
    for theirs, ours in rows(section("Coming from CLIKA CCO"))[2:]:
        for key in re.findall(r"`(\w+)`", theirs):
            assert key in _TRAINER_OWNS or any(key in values for values in settings.values()), key
        for argument in re.findall(r"[(\s](\w+)=", ours):
            assert argument in trainer or argument in checkpoint, argument
        for group, key in re.findall(r"`(\w+)\.(\w+)`", ours):
            assert key in settings[group]


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:\]\(|src=\")([\w/.]+)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_the_commands_are_targets() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE)) <= targets
