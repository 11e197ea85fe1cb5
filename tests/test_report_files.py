"""The files of the report in a run's folder: when they are written, what they remember, and that they end no training."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_modules import Classifier, batches, make_trainer, quick
from report_pages import quantized_net, state_of

from lightning_cco import CCOWarning
from lightning_cco.export.report import ExportReport
from lightning_cco.monitoring import Monitor, report_files
from lightning_cco.monitoring.epoch import EpochMetrics, EpochResults
from lightning_cco.report_page.data import RunState

FILES = {"report.html", "report.json", "model_explorer.json", "model_explorer_data.json"}


def told(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert f'"step":{found["step"]},' in (folder / "report.html").read_text(encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def state() -> RunState:
    torch.manual_seed(0)
    return state_of(quantized_net())


def show_epoch(monitor: Monitor, state: RunState, epoch: int) -> None:
    assert state.plan is not None
    assert state.report is not None
    assert state.losses is not None
    settings = state.plan.settings
    monitor.on_losses(epoch, 10 * epoch, state.plan, state.losses, settings)
    metrics = EpochMetrics({"val_acc": 0.1 * epoch}, {"val_acc": 0.9})
    monitor.on_epoch(EpochResults(epoch, 10 * epoch, state.plan, settings, state.report, metrics, views=state.views, facts=state.facts))


def test_a_training_writes_them_before_each_epoch_and_at_the_end(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Noted(Classifier):
        def on_train_epoch_start(self) -> None:
            seen.append(told(tmp_path / "cco")["epoch"])

    cco, trainer = quick(), make_trainer(tmp_path, max_epochs=2)
    trainer.callbacks.append(cco)
    trainer.fit(Noted(), batches(), batches())
    assert seen == [None, 0]
    now = told(tmp_path / "cco")
    assert (now["epoch"], now["finished"], now["title"]) == (1, True, "Noted")
    assert {path.name for path in (tmp_path / "cco").iterdir()} >= FILES
    assert now["metrics"]["epochs"] == now["qs"]["epochs"] == [0, 1]
    layers = {layer["name"]: layer for layer in now["layers"]}
    assert cco.quantized is not None
    for name, layer in layers.items():
        assert ("histogram" in layer.get("weights", {})) == (name in cco.quantized.weights), name
    cco.export(tmp_path / "model.onnx")
    assert told(tmp_path / "cco")["export"]["path"].endswith("model.onnx")


def test_the_history_is_bounded_and_goes_on_after_a_resume(tmp_path: Path, state: RunState) -> None:
    monitor = Monitor(tmp_path / "first", draw=False)
    for epoch in range(60):
        monitor.past.add(epoch, {"conv": 1.0}, {})
        monitor.past_metrics.add(epoch, {"val_acc": 0.5}, {})
    show_epoch(monitor, state, 60)
    epochs = told(tmp_path / "first")["qs"]["epochs"]
    assert epochs == told(tmp_path / "first")["metrics"]["epochs"] == [*range(10), *range(31, 61)]
    again = Monitor(tmp_path / "again", draw=False)
    again.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    show_epoch(again, state, 61)
    resumed = told(tmp_path / "again")
    assert resumed["qs"]["epochs"][-2:] == resumed["metrics"]["epochs"][-2:] == [60, 61]
    assert len(resumed["qs"]["epochs"]) < 20
    assert resumed["metrics"]["values"]["val_acc"][-2:] == [6, 6.1]
    assert resumed["loss"]["epochs"] == [60, 61]


def test_an_error_is_one_warning(tmp_path: Path, state: RunState, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("of the page")

    monkeypatch.setattr(report_files, "report_data", fail)
    monitor = Monitor(tmp_path, draw=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CCOWarning)
        show_epoch(monitor, state, 0)
        show_epoch(monitor, state, 1)
        monitor.finish()
    assert "report page" in str(caught[0].message)
    assert "ZeroDivisionError: of the page. The training goes on" in str(caught[0].message)
    assert len(caught) == 1
    assert (tmp_path / "sensitivity.csv").is_file()
    assert not FILES & {path.name for path in tmp_path.iterdir()}


def test_nothing_is_written_where_nothing_is_shown(tmp_path: Path, state: RunState) -> None:
    monitor = Monitor(tmp_path / "none", enabled=False)
    show_epoch(monitor, state, 0)
    monitor.finish()
    assert not (tmp_path / "none").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        remote = Monitor("s3://bucket/run", draw=False)
        remote.folder.open()
    show_epoch(remote, state, 0)
    remote.on_export(ExportReport(str(tmp_path / "model.onnx")))
    remote.finish()
    assert remote._report.paths == []


def test_a_long_line_of_an_export_report_is_folded_and_whole() -> None:
    report = ExportReport("model.onnx", batches=1)
    report.inputs = {f"a_rather_long_name_of_an_input_{number}": ["batch", 3, "height", "width"] for number in range(12)}
    report.notes = [
        "sizes within which the file holds: " + "; ".join(f"axis {n} of 'pixel_values' {n} at least" for n in range(40)),
        "short",
    ]
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 200
    assert "  note: short" in lines
    said = " ".join(str(report).split())
    assert " ".join(report.notes[0].split()) in said
    assert all(name in said for name in report.inputs)
    assert all(line.startswith("  ") for line in lines[1:])
