"""Whatever becomes of the folder, the files and the loggers: the training goes on, with one warning for each kind of fault."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_modules import Classifier, batches, make_trainer
from models import GuideCNN

from lightning_cco import CCOCallback, CCOError, CCOWarning, QuantizedModel, quantize
from lightning_cco.files import remove_abandoned, temporary_folder, write_file
from lightning_cco.monitoring import Monitor, monitor, pictures
from lightning_cco.monitoring.epoch import EpochMetrics, EpochResults
from lightning_cco.monitoring.history import History


def folder_to_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def file_to_folder(folder: Path) -> None:
    for name in ("sensitivity.csv", "suggested_skips.yaml", "heat_map.png"):
        (folder / name).unlink()
        (folder / name).mkdir()


def file_to_pipe(folder: Path) -> None:
    for name in ("sensitivity.csv", "suggested_skips.yaml"):
        (folder / name).unlink()
        os.mkfifo(folder / name)


def loop_of_links(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder)


@pytest.mark.parametrize(
    ("spoil", "count"), [(shutil.rmtree, 0), (folder_to_file, 1), (file_to_folder, 1), (file_to_pipe, 1), (loop_of_links, 1)]
)
def test_a_folder_that_goes_wrong_ends_nothing(spoil: Callable[[Path], None], count: int, tmp_path: Path) -> None:
    class Spoil(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                spoil(tmp_path / "out")

    recipe = {"training_settings": {"stats_steps": 1}, "monitoring_settings": {"output_dir": str(tmp_path / "out"), "draw_graph": False}}
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make_trainer(tmp_path, CCOCallback(recipe), Spoil(), checkpoint, max_epochs=3).fit(Classifier(), batches())
    assert len([warning for warning in found if issubclass(warning.category, CCOWarning)]) == count
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    if spoil is shutil.rmtree:
        assert {"sensitivity.csv", "resolved_recipe.yaml", "suggested_skips.yaml"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.fixture(scope="module")
def quantized() -> QuantizedModel:
    torch.manual_seed(0)
    found = quantize(GuideCNN().eval(), None, (GuideCNN.example(),))
    found.calibrate([(GuideCNN.example(),)])
    return found


def show_epoch(shower: Monitor, quantized: QuantizedModel, epoch: int, metrics: dict[str, float] | None = None) -> None:
    report = quantized.sensitivity([(GuideCNN.example(),)])
    shower.on_epoch(EpochResults(epoch, epoch, quantized.plan, quantized.settings, report, EpochMetrics(metrics or {})))


@pytest.mark.parametrize("what", ["heat_map", "suggestions_yaml", "save_pictures", "graph_def"])
def test_an_error_in_drawing_ends_nothing(what: str, quantized: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise KeyError("unforeseen")

    monkeypatch.setattr(pictures if what == "save_pictures" else monitor, what, fail)
    shower = Monitor(tmp_path, [TensorBoardLogger(tmp_path / "log")])

    def run() -> None:
        shower.on_start(quantized.graph, quantized.plan)
        show_epoch(shower, quantized, 0)
        show_epoch(shower, quantized, 1)
        shower.finish()

    with pytest.warns(CCOWarning, match=r"KeyError: 'unforeseen'.*goes on") as found:
        run()
    assert len(found) == 1
    assert (tmp_path / "sensitivity.csv").exists()


def test_a_remote_folder_is_no_folder_of_that_name(quantized: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shower = Monitor("s3://bucket/run", draw=False)
    with pytest.warns(CCOWarning, match="not on a disk"):
        shower.on_start(quantized.graph, quantized.plan)
    show_epoch(shower, quantized, 0)
    assert list(tmp_path.iterdir()) == []


def epochs_in(path: Path) -> list[int]:
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert all(len(row) == len(rows[0]) for row in rows)
    return sorted({int(row[0]) for row in rows[1:]})


def test_the_table_grows_by_appending_and_follows_a_resume(quantized: QuantizedModel, tmp_path: Path) -> None:
    first = Monitor(tmp_path / "a", draw=False)
    for epoch in range(3):
        show_epoch(first, quantized, epoch)
    inode = (tmp_path / "a" / "sensitivity.csv").stat().st_ino
    show_epoch(first, quantized, 3)
    assert (tmp_path / "a" / "sensitivity.csv").stat().st_ino == inode
    with (tmp_path / "a" / "sensitivity.csv").open("a") as file:
        file.write("4,conv,con")  # killed in the middle of a row
    for folder in ("a", "b"):
        resumed = Monitor(tmp_path / folder, draw=False)
        resumed.load_state_dict(first.state_dict())
        show_epoch(resumed, quantized, 2)
        assert epochs_in(tmp_path / folder / "sensitivity.csv") == [0, 1, 2]
    show_epoch(Monitor(tmp_path / "a", draw=False), quantized, 0)
    assert epochs_in(tmp_path / "a" / "sensitivity.csv") == [0]


def test_two_runs_in_one_folder_are_told(quantized: QuantizedModel, tmp_path: Path) -> None:
    one, two = Monitor(tmp_path, draw=False), Monitor(tmp_path, draw=False)
    show_epoch(one, quantized, 0)
    show_epoch(two, quantized, 0)
    with pytest.warns(CCOWarning, match="another run writes into"):
        show_epoch(one, quantized, 1)
    show_epoch(two, quantized, 1)
    show_epoch(one, quantized, 2)
    assert epochs_in(tmp_path / "sensitivity.csv") == [0, 1]
    assert epochs_in(tmp_path / "sensitivity_2.csv") == [0, 1, 2]
    resumed = Monitor(tmp_path, draw=False)
    resumed.load_state_dict(one.state_dict())
    assert resumed._csv.earlier == tmp_path / "sensitivity_2.csv"


def test_what_a_checkpoint_keeps_is_bounded(tmp_path: Path) -> None:
    past, sizes = History(), []
    for epoch in range(60):
        past.add(epoch, {f"linear_{i}": float(i) for i in range(200)}, {"loss": 1.0})
        torch.save(past.state_dict(), tmp_path / "state.pt")
        sizes.append((tmp_path / "state.pt").stat().st_size)
    assert sizes[-1] == pytest.approx(sizes[20], rel=0.02)
    assert sizes[-1] < 16_000
    assert len(past.epochs) == 40
    again = History()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [epoch for epoch, _ in again.epochs] == [0, 1, 2, 3, *range(48, 60)]
    assert again.epochs[-1][1] == {f"linear_{i}": float(i) for i in range(160, 200)}


def test_the_history_of_an_older_version_is_taken_over(tmp_path: Path) -> None:
    old = {"history": [{"epoch": 0, "qs": {"conv": 1.5}}], "extremes": {}, "previous": {"loss": 2.0}, "followed": ["conv"], "rows": [["0"]]}
    shower = Monitor(tmp_path, draw=False)
    shower.load_state_dict(old)
    assert shower.past.epochs == [(0, {"conv": 1.5})]
    assert shower.past.count == 1


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    def work(sign: str) -> None:
        for _ in range(50):
            write_file(tmp_path / "file", sign * 10_000)

    threads = [threading.Thread(target=work, args=(sign,)) for sign in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set((tmp_path / "file").read_text())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    process = os.fork()
    if process == 0:
        with temporary_folder(tmp_path) as folder:
            (folder / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".cco-note").write_text("a user's")
    remove_abandoned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".cco-note"]


@pytest.mark.parametrize("name", ["model.engine", "model", "model.xml", "folder.onnx", "pipe.onnx", "folder.pt2", "a\0.onnx"])
def test_an_export_writes_files_only(name: str, quantized: QuantizedModel, tmp_path: Path) -> None:
    for folder in ("folder.onnx", "folder.pt2"):
        (tmp_path / folder).mkdir()
    os.mkfifo(tmp_path / "pipe.onnx")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CCOError, match=r"ends in \.onnx|can't be written"):
        quantized.export(tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("path", [None, 3, b"model.onnx", "\udc80.onnx"])
def test_what_is_no_path_is_refused_at_once(path: Any, quantized: QuantizedModel) -> None:
    with pytest.raises(CCOError, match=r"export: (expected a path, got \w+|.* is no text that engines can open)"):
        quantized.export(path)


def test_a_working_directory_that_is_gone(quantized: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(CCOError, match="can't be written"):
        quantized.export("model.onnx")


def test_a_program_is_written_through_a_link_and_nothing_is_left(
    quantized: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link.pt2").symlink_to(tmp_path / "store" / "real.pt2")
    quantized.export(tmp_path / "link.pt2")
    assert (tmp_path / "link.pt2").is_symlink()
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["real.pt2"]

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.export, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantized.export(tmp_path / "store" / "other.pt2")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["real.pt2"]
