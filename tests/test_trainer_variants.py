"""Ways of using a Trainer in which the ranges could be those of other weights, or the result could get lost."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import Classifier, batches, make_trainer, quick
from torch import nn

from lightning_cco import CCOCallback
from lightning_cco.checkpoints import best_checkpoint
from lightning_cco.errors import CCOError, CCOWarning


def scales(cco: CCOCallback) -> dict[str, float]:
    return {key: float(quantizer.scale.max()) for key, quantizer in cco.quantized.activations.items()}


def fitted(folder: Path, *callbacks: Any, **options: Any) -> tuple[CCOCallback, pl.Trainer, Classifier]:
    cco, model = quick(), Classifier()
    trainer = make_trainer(folder, cco, *callbacks, **options)
    trainer.fit(model, batches(), batches(seed=5))
    return cco, trainer, model


def expected_scales(cco: CCOCallback, model: pl.LightningModule) -> dict[str, float]:
    """Those of a calibration of a fresh copy of the weights on the batches that the callback holds."""
    from lightning_cco import quantize

    plain = Classifier()
    plain.eval().load_state_dict(model.state_dict())  # as they are tested: by their running statistics
    twin = quantize(plain, cco.settings, (cco._run.compression.held[0][0],))
    twin.calibrate([batch[0] for batch in cco._run.compression.held])
    return {key: float(quantizer.scale.max()) for key, quantizer in twin.activations.items()}


def test_weights_without_ranges_are_tested_with_ranges_of_their_own(tmp_path: Path) -> None:
    cco, trainer, model = fitted(tmp_path, ModelCheckpoint(tmp_path, monitor="val_loss", mode="max", save_weights_only=True), max_epochs=3)
    before = scales(cco)
    trainer.test(model, batches(), ckpt_path="best", verbose=False)
    after = scales(cco)
    assert after != before
    assert after == pytest.approx(expected_scales(cco, model), rel=1e-4)
    trainer.test(model, batches(), ckpt_path="best", verbose=False)
    assert scales(cco) == pytest.approx(after)


def test_another_module_with_the_checkpoint_s_weights_gets_ranges_of_its_own(tmp_path: Path) -> None:
    cco, trainer, _ = fitted(tmp_path, ModelCheckpoint(tmp_path, monitor="val_loss", mode="max", save_weights_only=True), max_epochs=3)
    before = scales(cco)
    other = Classifier()
    other.load_state_dict(torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"])
    trainer.test(other, batches(), verbose=False)
    assert cco.quantized.model is other
    assert scales(cco) != before
    assert scales(cco) == pytest.approx(expected_scales(cco, other), rel=1e-4)


def test_a_whole_checkpoint_brings_its_ranges(tmp_path: Path) -> None:
    cco, trainer, model = fitted(tmp_path, ModelCheckpoint(tmp_path, monitor="val_loss", mode="max"), max_epochs=3)
    trainer.test(model, batches(), ckpt_path="best", verbose=False)
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["callbacks"]["CCOCallback"]["quantized"]["ranges"]
    assert scales(cco) == pytest.approx({key: float(torch.as_tensor(entry["scale"]).max()) for key, entry in saved.items()})


def test_a_second_fit_of_another_model_begins_anew(tmp_path: Path) -> None:
    cco, _, _ = fitted(tmp_path)
    cco.original_metrics["val_loss"], before = 123.0, scales(cco)
    other = Classifier()
    other.net.relu = nn.SiLU()  # of another architecture
    make_trainer(tmp_path, cco).fit(other, batches(), batches(seed=5))
    assert cco.quantized.model is other
    assert cco.original_metrics["val_loss"] < 10.0
    assert set(scales(cco)) != set(before)


class Stopping(pl.Callback):
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"limit_train_batches": 0}, "limit_train_batches is 0"),
        ({"max_epochs": 0}, "max_epochs is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_time": {"seconds": 0}}, "the time of the Timer"),
        ({"stopped": True}, "trainer.should_stop was set before"),
    ],
    ids=str,
)
def test_a_fit_without_a_batch_says_that_nothing_was_compressed(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    cco = quick(deployment_settings={"export_dir": str(tmp_path / "int8")})
    others = [Stopping()] if options.pop("stopped", False) else []
    options = {"max_epochs": 2, "min_epochs": 0, **options}
    with pytest.warns(CCOWarning, match=rf"ended before its first batch \({why}.* nothing was exported"):
        make_trainer(tmp_path, cco, *others, **options).fit(Classifier(), batches())
    assert cco.quantized is None
    assert not (tmp_path / "int8").exists()


def test_a_missing_package_is_said_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else found(name, *rest))
    trainer = make_trainer(tmp_path, quick(deployment_settings={"export_dir": str(tmp_path / "int8")}))
    with pytest.raises(CCOError, match=r"onnxscript not installed.*pip install"):
        trainer.fit(Classifier(), batches())
    assert trainer.global_step == 0


@pytest.mark.parametrize("folder", ["memory://int8", "s3://bucket/int8"])
def test_a_remote_export_dir_is_refused_before_the_training(folder: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quick(deployment_settings={"export_dir": folder}))
    with pytest.raises(CCOError, match="not on a disk of this machine"):
        trainer.fit(Classifier(), batches())
    assert trainer.global_step == 0


def test_the_best_checkpoint_is_that_of_the_first_callback_that_monitors(tmp_path: Path) -> None:
    cco, model = quick(), Classifier()
    last, best = (
        ModelCheckpoint(tmp_path / "last", every_n_train_steps=1),
        ModelCheckpoint(tmp_path / "best", monitor="val_loss", mode="max"),
    )
    trainer = make_trainer(tmp_path, cco, last, best, max_epochs=2)
    assert best_checkpoint(trainer)[0] == ""
    trainer.fit(model, batches(), batches(seed=5))
    path, why = best_checkpoint(trainer)
    assert path == best.best_model_path
    assert why == "the max of val_loss; 1 other checkpoint callbacks were not asked"


@pytest.mark.slow
def test_fast_dev_run_tries_the_export_and_writes_nothing(tmp_path: Path) -> None:
    cco = quick(deployment_settings={"export_dir": f"file://{tmp_path / 'int8'}"})
    make_trainer(tmp_path, cco, fast_dev_run=True).fit(Classifier(), batches())
    assert not (tmp_path / "int8").exists()
    make_trainer(tmp_path, cco).fit(cco.quantized.model, batches())
    assert (tmp_path / "int8" / "Classifier_int8.onnx").exists()


def test_export_works_after_a_test_in_a_fresh_process(tmp_path: Path) -> None:
    _, trainer, _ = fitted(tmp_path, ModelCheckpoint(tmp_path, monitor="val_loss"))
    cco = quick()
    make_trainer(tmp_path, cco).test(Classifier(), batches(), ckpt_path=trainer.checkpoint_callback.best_model_path, verbose=False)
    assert cco._run.compression.held
    cco.export(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").exists()
