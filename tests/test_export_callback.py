"""The callback hands the file over: after fit, by itself, from the best checkpoint, checked on the held batches."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from export_case import run
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_modules import Classifier, batches, make_trainer
from weight_averages import averaging

from lightning_cco import CCOCallback, CCOError

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


QUICK = {"training_settings": {"stats_steps": 2}, "monitoring_settings": {"draw_graph": False}}


def test_the_callback_exports_after_fit(tmp_path: Path) -> None:
    cco, model = CCOCallback(QUICK), Classifier()
    with pytest.raises(CCOError, match=r"trainer\.fit"):
        cco.export(tmp_path / "model.onnx")
    make_trainer(tmp_path, cco).fit(model, batches())
    report = cco.export(tmp_path / "model.onnx")
    assert report.sqnr_db > 20
    assert json.loads((tmp_path / "model.onnx.export_report.json").read_text())["integer_nodes"]["QLinearConv"] == 5
    cco.export(tmp_path / "again.onnx", dynamic_batch=False)
    assert json.loads((tmp_path / "model.onnx.export_report.json").read_text())["path"] == str(tmp_path / "model.onnx")
    assert json.loads((tmp_path / "again.onnx.export_report.json").read_text())["path"] == str(tmp_path / "again.onnx")
    x = next(iter(batches()))[0]
    model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(run(tmp_path / "model.onnx", x), model(x).numpy(), atol=0.1)


def test_it_is_checked_on_every_held_batch_and_shown_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cco = CCOCallback({**QUICK, "monitoring_settings": {"draw_graph": False, "sensitivity_batches": 3}})
    logger = TensorBoardLogger(tmp_path / "log", name="", version="")
    make_trainer(tmp_path, cco, logger=logger).fit(Classifier(), batches())
    assert cco.export(tmp_path / "model.onnx").batches == 3
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path / "log"), size_guidance={"tensors": 0})
    events.Reload()
    shown = events.Tensors("cco/3_export/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "QLinearConv" in shown


def test_export_dir_hands_over_the_best_checkpoint(tmp_path: Path) -> None:
    cco = CCOCallback({**QUICK, "deployment_settings": {"export_dir": str(tmp_path / "int8")}})
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="val_loss", mode="max")  # the best is then not the last
    model, val = Classifier(), batches(seed=5)
    trainer = make_trainer(tmp_path, cco, checkpoint, max_epochs=3)
    trainer.fit(model, batches(), val)
    after_fit = {name: value.clone() for name, value in model.state_dict().items()}
    written = json.loads((tmp_path / "int8" / "Classifier_int8.onnx.export_report.json").read_text())
    assert written["sqnr_db"] > 20
    x = next(iter(val))[0]
    got = run(tmp_path / "int8" / "Classifier_int8.onnx", x)
    assert all(torch.equal(value, after_fit[name]) for name, value in model.state_dict().items())
    trainer.test(model, val, ckpt_path="best", verbose=False)
    model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(got, model(x).numpy(), atol=0.1)


def test_export_dir_without_checkpoints_hands_over_the_last_weights(tmp_path: Path) -> None:
    cco = CCOCallback({**QUICK, "deployment_settings": {"export_dir": str(tmp_path / "int8")}})
    model, val = Classifier(), batches(seed=5)
    make_trainer(tmp_path, cco).fit(model, batches(), val)
    x = next(iter(val))[0]
    model.eval()
    with torch.no_grad():
        np.testing.assert_allclose(run(tmp_path / "int8" / "Classifier_int8.onnx", x), model(x).numpy(), atol=0.1)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_export_dir_hands_over_averaged_weights(before: bool, tmp_path: Path) -> None:
    cco = CCOCallback({**QUICK, "deployment_settings": {"export_dir": str(tmp_path / "int8")}})
    average, checkpoint = averaging("EMAWeightAveraging", decay=0.9), ModelCheckpoint(tmp_path / "checkpoints", monitor="val_loss")
    model, val = Classifier(), batches(seed=5)
    trainer = make_trainer(tmp_path, *((average, cco) if before else (cco, average)), checkpoint, max_epochs=2)
    trainer.fit(model, batches(), val)
    x = next(iter(val))[0]
    got = run(tmp_path / "int8" / "Classifier_int8.onnx", x)
    fresh, saved = CCOCallback(QUICK), Classifier()
    make_trainer(tmp_path, fresh).test(saved, val, ckpt_path=checkpoint.best_model_path, verbose=False)
    saved.eval()
    with torch.no_grad():
        expected = saved(x).numpy()
    assert np.square(got - expected).mean() < 1e-3 * np.square(expected).mean()


@pytest.mark.slow
def test_export_dir_on_two_processes_is_written_once(tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parent
    command = [sys.executable, "-W", "ignore", str(tests / "two_processes.py"), str(tmp_path), "ddp", str(tmp_path / "int8")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    subprocess.run(command, check=True, timeout=240, env=environment, cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / "int8").iterdir()) == [
        "Classifier_int8.onnx",
        "Classifier_int8.onnx.export_report.json",
    ]
    assert json.loads((tmp_path / "int8" / "Classifier_int8.onnx.export_report.json").read_text())["sqnr_db"] > 20
    assert (tmp_path / "rank1.pt").exists()


def test_a_tested_checkpoint_is_exported_with_its_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints")
    make_trainer(tmp_path, CCOCallback(QUICK), checkpoint, enable_checkpointing=True).fit(Classifier(), batches())
    fresh = CCOCallback(QUICK)
    make_trainer(tmp_path, fresh).test(Classifier(), batches(), ckpt_path=checkpoint.best_model_path)
    with caplog.at_level(logging.INFO):
        report = fresh.export(tmp_path / "model.onnx")
    assert f"(1 held batch, {report.variations} variation" in str(
        report
    )  # one of the test: no batch of the training or the validation was there
    assert f"Writing {tmp_path / 'model.onnx'}" in caplog.text
    assert "runs in INT8        5 QLinearConv" in caplog.text
    assert json.loads((tmp_path / "model.onnx.export_report.json").read_text())["integer_nodes"]["QLinearConv"] == 5
