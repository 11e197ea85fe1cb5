"""What the README says is so: its code runs, its tables name what there is. The pages in docs/ have tests of their own, in tests/docs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from models import ResidualCNN

import lightning_cco as cc
from lightning_cco._recipes import shipped_recipes

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


def test_every_recipe_and_script_is_listed() -> None:
    names = {name for row in rows(section("Recipes")) for name in re.findall(r"`([\w.]+)`", row[0])}
    scripts = {path.name for path in (ROOT / "recipes").glob("*.py")} - {"digits.py"}  # the demo's model and data
    assert names == set(shipped_recipes()) | scripts


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:\]\(|src=\")([\w/.-]+)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_the_commands_are_targets() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE)) <= targets
