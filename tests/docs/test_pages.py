"""What the documentation names is there: settings, messages, pages, public names."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml
from messages import texts_in_code
from models import ResidualCNN

import lightning_cco as cc
from lightning_cco._parsing import _TRAINER_OWNS
from lightning_cco._recipes import shipped_recipes
from lightning_cco.settings import LayerRule

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """Cells of each row of the Markdown tables in a text."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("script", ["settings", "modules"])
def test_the_pages_made_from_the_code_are_as_it_says(script: str) -> None:
    spec = importlib.util.spec_from_file_location(f"{script}_page", DOCS / f"{script}_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == read(f"{script}.md"), f"run: python docs/{script}_page.py --write"


def test_every_module_says_what_it_is() -> None:
    assert not [row for row in rows(read("modules.md")) if len(row) > 1 and not row[1] and row[0] != "module"]


def test_the_page_of_settings_names_every_setting_and_its_default() -> None:
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |<!--)", read("settings.md"), flags=re.DOTALL | re.MULTILINE))
    assert not re.search(r">>>|(Example|Raises|Args):", "".join(sections.values()))  # a docstring's other parts are not a key's description
    defaults = cc.Settings().to_dict()
    assert set(defaults) <= set(sections)
    for section, values in defaults.items():
        said = {row[0].strip("`"): row[2].strip("`") for row in rows(sections[section])[2:]}
        if section == "layer_settings":
            assert set(said) == {field.name for field in dataclasses.fields(LayerRule)}
        else:
            assert {name: yaml.safe_load(default) for name, default in said.items()} == values
    assert set(re.findall(r"^\| `(w\d\w*)`", read("settings.md"), flags=re.MULTILINE)) == set(shipped_recipes())


def test_every_quoted_message_is_in_the_code() -> None:
    headings = re.findall(r"^### `(.*)`$", read("troubleshooting.md"), flags=re.MULTILINE)
    assert len(headings) > 30
    texts = texts_in_code()
    for heading in headings:
        parts = [re.escape(part.strip()) for part in heading.removeprefix("export: ").split("…")]  # `ExportError` writes that before each
        found = re.compile(".*?".join(parts), flags=re.DOTALL)
        assert any(found.search(text) for text in texts), heading


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    named = set(re.findall(r"^::: [\w.]*?(\w+)$", read("api.md"), flags=re.MULTILINE))
    assert set(cc.__all__) <= named


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert set(re.findall(r": ([\w/-]+\.md)$", navigation, flags=re.MULTILINE)) == pages


def test_clikas_settings_map_to_what_there_is() -> None:
    trainer = inspect.signature(pl.Trainer.__init__).parameters
    checkpoint = inspect.signature(pl.callbacks.ModelCheckpoint.__init__).parameters
    settings = cc.Settings().to_dict()
    table = read("clika.md").partition("```python")[0]
    assert len(rows(table)) > 12
    for theirs, ours in rows(table)[2:]:
        for key in re.findall(r"`(\w+)`", theirs):
            assert key in _TRAINER_OWNS or any(key in values for values in settings.values()), key
        for argument in re.findall(r"[(\s](\w+)=", ours):
            assert argument in trainer or argument in checkpoint, argument
        for group, key in re.findall(r"`(\w+)\.(\w+)`", ours):
            assert key in settings[group]


def test_the_examples_of_clikas_guide_select_these_layers() -> None:
    [code] = re.findall(r"```python\n(.*?)```", read("clika.md"), flags=re.DOTALL)
    found: dict[str, object] = {}
    exec(code, found)
    plan = cc.plan_quantization(cc.capture_graph(ResidualCNN(), ResidualCNN.example()), found["settings"])
    skipped = {name for name, reason in plan.skipped.items() if reason.startswith("setting")}
    assert skipped == {"input_0", "adaptive_avg_pool", "flatten", "linear"}


@pytest.mark.parametrize("page", sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")))
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)):
        assert (DOCS / page).parent.joinpath(target).exists(), target
