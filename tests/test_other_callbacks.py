"""Other callbacks and the tuner do their work beside CCOCallback, whatever the order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lightning_modules import Classifier, assert_acts, assert_quantized, batches, make_trainer, quick, run_fit
from torch.utils.data import DataLoader
from weight_averages import averaging

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


# Under StochasticWeightAveraging the model takes the average when fit ends; under the others in each validation and checkpoint.
@pytest.mark.filterwarnings("ignore:Swapping scheduler", "ignore:.*lr_scheduler.step\\(\\)")
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "averaging",
    [
        pytest.param(lambda: averaging("EMAWeightAveraging", decay=0.5), id="EMAWeightAveraging"),
        pytest.param(lambda: averaging("WeightAveraging"), id="WeightAveraging"),
        pytest.param(lambda: StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1), id="StochasticWeightAveraging"),
    ],
)
def test_averaged_weights_are_validated_and_saved_quantized(averaging: Callable[[], pl.Callback], before: bool, tmp_path: Path) -> None:
    pl.seed_everything(1, verbose=False)
    cco, average, model, val = quick(), averaging(), Classifier(), batches(seed=5)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="val_loss", save_last=True)
    trainer = make_trainer(tmp_path, *((average, cco) if before else (cco, average)), checkpoint, max_epochs=3)
    trainer.fit(model, batches(), val)
    assert cco.quantized.model is model
    assert cco.quantized.drift == []
    assert_acts(cco)
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    plain = Classifier()
    plain.load_state_dict(saved["state_dict"], strict=True)
    # The number it was chosen by is that of the weights and ranges in it.
    fresh = quick()
    result = make_trainer(tmp_path, fresh).test(Classifier(), val, ckpt_path=checkpoint.best_model_path, verbose=False)[0]["test_loss"]
    assert result == pytest.approx(float(checkpoint.best_model_score), rel=1e-5)
    assert fresh.quantized.calibrated
    assert make_trainer(tmp_path).test(plain, val, verbose=False)[0]["test_loss"] != result
    if not isinstance(average, StochasticWeightAveraging):
        assert any(not torch.equal(value, saved["current_model_state"][name]) for name, value in saved["state_dict"].items())


@pytest.mark.parametrize("metric", ["cco/qs_max", "cco/qs_mean", "cco/sqnr_min", "cco/num_quantized_layers", "cco/num_suggested_skips"])
def test_every_logged_value_can_be_monitored(metric: str, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor=metric, filename="{epoch}")
    never = EarlyStopping(metric, min_delta=1e9, patience=2)
    run = run_fit(tmp_path, Classifier, checkpoint, never, max_epochs=9)
    assert run.trainer.current_epoch == 3  # the first is an improvement on nothing
    assert never.stopped_epoch == 2
    best = torch.load(checkpoint.best_model_path, weights_only=True)
    assert float(checkpoint.best_model_score) == pytest.approx(float(best["callbacks"][checkpoint.state_key]["current_score"]))
    if metric == "cco/qs_max" and best["epoch"] == 2:
        assert float(checkpoint.best_model_score) == pytest.approx(max(entry.qs for entry in run.cco.report.local.values()))


class Tuned(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 1e-3, 2

    def train_dataloader(self) -> Any:
        return DataLoader(batches().dataset, self.batch_size)

    def val_dataloader(self) -> Any:  # the batch-size finder asks for it in any model with a validation step
        return batches(seed=5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)


@pytest.mark.parametrize("hooked", [False, True], ids=["before_fit", "after_fit"])
def test_tuner(hooked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, cco = Tuned(), quick()
    trainer = make_trainer(tmp_path, cco)
    if hooked:
        trainer.fit(model)
        trainer = make_trainer(tmp_path, cco)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    ranges = cco.state_dict()
    Tuner(trainer).lr_find(model, num_training=30, attr_name="lr")
    Tuner(trainer).scale_batch_size(model, max_trials=2, steps_per_trial=1, init_val=2)
    assert model.lr != 1e-3
    assert model.batch_size == 4
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    if hooked:
        for key, quantizer in cco.quantized.activations.items():
            assert float(quantizer.max_val) == float(ranges["quantized"]["ranges"][key]["max_val"]), key
    trainer.fit(model)
    assert cco.report.local
    assert_acts(cco)


def test_a_learning_rate_monitor_and_a_csv_logger_beside_it(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    run = run_fit(tmp_path, Classifier, LearningRateMonitor(), logger=logger, log_every_n_steps=1, max_epochs=2)
    assert_quantized(run)
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "lr-Adam" in header
    assert "cco/qs_max" in header


@pytest.mark.slow
def test_hydra_multirun_over_recipes(tmp_path: Path) -> None:
    command = [
        sys.executable, "-W", "ignore", str(RECIPES / "hydra_app.py"), "--multirun", "cco@callbacks.cco.cfg=w8a8,w4a8", "trainer.max_epochs=1",
        "+trainer.limit_train_batches=2", "+trainer.enable_progress_bar=false", f"hydra.sweep.dir={tmp_path}/sweep",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    bits = []
    for job in ("0", "1"):
        (recipe,) = (tmp_path / "sweep" / job).rglob("resolved_recipe.yaml")
        bits.append("weights_num_bits: 4" in recipe.read_text())
    assert bits == [False, True]
