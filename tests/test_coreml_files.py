"""Packages for Core ML: converted and read, not run; what is read otherwise than planned is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from export_case import calibrated
from models import GuideCNN
from program_engine import InTorch

from lightning_cco import CCOError, QuantizedModel
from lightning_cco.export.engines import BY_ENDING, Converted
from lightning_cco.export.report import ExportReport

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.export's own
PROGRAM = {"deployment_settings": {"target_framework": "coreml"}}


class Package(InTorch):
    """Writes folders, which can't be run."""

    faults: Mapping[str, str] = MappingProxyType({})

    def convert(self, program: Path, target: Path) -> Converted:
        file = program.with_name("made")
        made = super().convert(program, file)
        target.mkdir()
        (target / "Manifest.json").write_text("{}")
        file.replace(target / "weight.bin")
        return dataclasses.replace(made, faults=self.faults)

    def run(self, *_: Any) -> Any:
        raise AssertionError("it can't be run")


def in_folders(monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> None:
    made = type("Package", (Package,), attributes)
    engine = dataclasses.replace(BY_ENDING[".mlpackage"], start=made, package="torch")
    monkeypatch.setitem(BY_ENDING, ".mlpackage", engine)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cnn() -> QuantizedModel:
    return calibrated(GuideCNN(), GuideCNN.example, PROGRAM)[0]


def test_a_package_is_read_and_not_run(cnn: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_folders(monkeypatch)
    for _ in range(2):  # over an older one
        report = cnn.export(tmp_path / "model.mlpackage", batches=[(torch.randn(3, 1, 8, 8),)])
    assert isinstance(report, ExportReport)
    assert sorted(path.name for path in (tmp_path / "model.mlpackage").iterdir()) == ["Manifest.json", "weight.bin"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.mlpackage"]
    assert report.size_bytes == sum(path.stat().st_size for path in (tmp_path / "model.mlpackage").iterdir())
    assert report.batches == 3
    assert report.sqnr_db > 60
    assert any("converted and read, not run" in note for note in report.notes)
    assert "not run, in INT8: 2 aten::conv2d" in str(report)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (
            {"faults": {"conv_1": "its weight has other scales"}},
            r"layer 'conv_1': its weight has other scales; the first layer that differs is 'conv_1'",
        ),
        ({"floats": ("conv_1",)}, r"Core ML \S+ computes in float what is planned in INT8: 'conv_1' \(aten::conv2d\), 1 in all"),
    ],
    ids=["stored", "float"],
)
def test_what_is_read_otherwise_is_refused(
    attributes: dict[str, Any], message: str, cnn: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_folders(monkeypatch, **attributes)
    with pytest.raises(CCOError, match=message):
        cnn.export(tmp_path / "model.mlpackage")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_package_stays(cnn: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_folders(monkeypatch)
    (tmp_path / "model.mlpackage").mkdir()
    (tmp_path / "model.mlpackage" / "mine.txt").write_text("kept")
    with pytest.raises(CCOError, match="a folder"):
        cnn.export(tmp_path / "model.mlpackage")
    assert (tmp_path / "model.mlpackage" / "mine.txt").read_text() == "kept"


def test_what_is_missing_is_said(cnn: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "coremltools" else object())
    with pytest.raises(CCOError, match=r"coremltools, which writes \.mlpackage.*pip install 'lightning-cco\[coreml\]'"):
        cnn.export(tmp_path / "model.mlpackage")
