"""A path that begins with ``~`` is in the home directory, wherever one is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning_modules import Classifier, batches, make_trainer, quick
from torch import nn

import lightning_cco as cc


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_of_an_export(tmp_path: Path) -> None:
    x = torch.randn(4, 3)
    quantized = cc.quantize(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), None, (x,))
    quantized.calibrate([x])
    quantized.export("~/files/model.pt2")
    assert (tmp_path / "home" / "files" / "model.pt2").is_file()
    assert list((tmp_path / "here").iterdir()) == []


def test_of_the_folder_for_pictures(tmp_path: Path) -> None:
    cco = quick(monitoring_settings={"output_dir": "~/run"})
    make_trainer(tmp_path / "logs", cco, max_steps=1).fit(Classifier(), batches())
    assert (tmp_path / "home" / "run" / "resolved_recipe.yaml").is_file()
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_of_the_export_at_the_end(tmp_path: Path) -> None:
    cco = quick(deployment_settings={"export_dir": "~/deployed"})
    make_trainer(tmp_path / "logs", cco, max_steps=1).fit(Classifier(), batches())
    assert [path.suffix for path in (tmp_path / "home" / "deployed").iterdir() if path.suffix == ".onnx"]
    assert list((tmp_path / "here").iterdir()) == []
