"""Names of modules may hold anything: every file stays well-formed, and nothing of a name is taken for more than a name."""

from __future__ import annotations

import csv
import io
import re
import xml.dom.minidom
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor, nn

from lightning_cco import CCOError, CCOWarning, QuantizedModel, load_settings, quantize
from lightning_cco.monitoring import Monitor
from lightning_cco.monitoring.epoch import EpochResults
from lightning_cco.monitoring.graph_def import graph_def
from lightning_cco.monitoring.tables import markdown_table, parsed_layers, sensitivity_rows
from lightning_cco.names import csv_cell, literal, printable, yaml_value
from lightning_cco.suggestions import Suggestion, suggestions_yaml

NAMES = [
    "x\n  - {match: linear, skip_quantization: true}\n#",
    "x\r\nevil: 1",
    "a\x00b\x07\x1b[31mred\x0b\x85\u2028",
    "\udc80\ufffe",
    "]]><script>|a|b\\|",
    "=cmd|'/C calc'!A0",
    "+1\t@x",
    "\u202eright\u200d to left",
    "${oc",
    "'\"{y: [1",
    "*?[a",
    "n" * 300,
    " - ",
]


class Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self._modules[self.name](x))  # type: ignore[misc]
        return out


def named(name: str) -> QuantizedModel:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    found = quantize(Named(name).eval(), None, (x,))
    found.calibrate([(x,)])
    return found


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_every_file_stays_well_formed(name: str, tmp_path: Path) -> None:
    model = named(name)
    report = model.sensitivity([(torch.randn(4, 3, 8, 8),)])
    shower = Monitor(tmp_path)
    shower.on_start(model.graph, model.plan)
    shower.on_epoch(EpochResults(0, 1, model.plan, model.settings, report))
    shower.finish()
    for picture in ("model_init.svg", "model_post_preprocessing.svg"):
        text = (tmp_path / picture).read_text(encoding="utf-8")
        xml.dom.minidom.parseString(text.encode())
        assert "<script>" not in text
    again = load_settings(tmp_path / "resolved_recipe.yaml")
    assert again == model.plan.resolved_settings()
    assert quantize(Named(name).eval(), again, model.example[0]).plan.quantized == model.plan.quantized
    text = (tmp_path / "sensitivity.csv").read_text(encoding="utf-8")
    cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@", "\t", "\r") and not re.fullmatch(r"-?[\d.e+-]+|-", cell)]
    assert all(cell.isprintable() for cell in cells)
    lines = markdown_table(["layer"] * 8, sensitivity_rows(report, model.plan)).split("\n")
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {9}
    assert all(line.isprintable() for line in parsed_layers(model.graph).split("\n"))
    graph_def(model.plan, {})


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_rules_about_such_names_are_read_back(name: str, tmp_path: Path) -> None:
    rules = [{"match": name, "weights_num_bits": 4}, {"match": "${a}" + name, "skip_quantization": True}]
    settings = load_settings({"layer_settings": rules})
    settings.save(tmp_path / "saved.yaml")
    assert load_settings(tmp_path / "saved.yaml") == settings
    (tmp_path / "more.yaml").write_text(suggestions_yaml([Suggestion(name, 1.0, 1.0, 1.0, f"it is {name}")], settings), encoding="utf-8")
    read = load_settings(tmp_path / "more.yaml").layer_settings
    assert [rule.match for rule in read] == [name, "${a}" + name, name]


def test_values_of_a_recipe_are_read_back() -> None:
    for value in [*NAMES, "", "null", "yes", "1", "1e3", "~", "a: b", "\\${x}", "\\\\${x}${y}", None, True, 4, 0.5, ["a", "b c"]]:
        text = yaml_value({"match": value})
        assert "\n" not in text
        read = yaml.safe_load(text)
        if "${" in text:
            read = OmegaConf.to_container(OmegaConf.create(read), resolve=True)
        assert read == {"match": value}
        assert literal({"a": value}) == {"a": value} or "${" in str(value)


def test_cells_of_a_spreadsheet_are_no_formulas() -> None:
    assert [csv_cell(text) for text in ("=1", " +1", "-x", "@a", "conv")] == ["'=1", "' +1", "'-x", "'@a", "conv"]


def test_errors_and_warnings_do_not_reach_the_terminal_raw() -> None:
    assert str(CCOError("a\x1b[31m\nb\udc80")) == "a\\x1b[31m\nb\\udc80"
    assert str(CCOWarning("a\x07")) == "a\\x07"
    assert printable("n" * 1000, 20) == "n" * 10 + "…" + "n" * 9
    graph = named("a\x1b[2J").graph
    with pytest.raises(CCOError) as found:
        graph.select("a\x1b[2J.5" + "z" * 10_000)
    assert all(line.isprintable() for line in str(found.value).split("\n"))
    assert len(str(found.value)) < 1000


@pytest.mark.parametrize("name", ["x\ny", "a\x00b", "\udc80", 'a"b', "class"])
def test_a_name_that_no_traced_model_can_hold_is_refused_by_the_export(name: str, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8)
    for ending in ("onnx", "pt2"):
        with pytest.raises(CCOError, match=r"the module .* can't be exported: its name (holds|is) .*Rename it"):
            named(name).export(tmp_path / f"model.{ending}", (x,))
    assert not list(tmp_path.iterdir())
