"""The metrics after calibration: those of an evaluation by hand, and the training does not notice that they were measured."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import Classifier, batches, make_trainer, quick
from test_loader_untouched import N, Reading, Samples
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_cco import CCOCallback, quantize

FEW = {"weights_num_bits": 3, "activations_num_bits": 3}


def test_they_are_those_of_the_calibrated_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    module, val = Classifier(), batches(shuffle=False, seed=5)
    reference = copy.deepcopy(module)
    cco = quick(global_quantization_settings=FEW)
    checkpoint = ModelCheckpoint(tmp_path)
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, cco, checkpoint).fit(module, batches(), val)
    images = [[batch[0]] for batch in batches()]
    quantized = quantize(reference, {"global_quantization_settings": FEW}, images[0])
    quantized.calibrate(images[:2])
    reference.eval()
    with torch.no_grad():
        losses = [float(reference._loss(batch)) for batch in val]
    assert cco.calibrated_metrics == {"val_loss": pytest.approx(sum(losses) / len(losses), rel=1e-5)}
    assert cco.calibrated_metrics["val_loss"] != pytest.approx(cco.original_metrics["val_loss"], rel=1e-5)
    assert "original  calibrated" in caplog.text
    again = quick(global_quantization_settings=FEW)
    counted = Counted(tmp_path / "validations")
    make_trainer(tmp_path, again, max_epochs=2, num_sanity_val_steps=0).fit(counted, batches(), val, ckpt_path=checkpoint.best_model_path)
    assert again.calibrated_metrics == cco.calibrated_metrics
    assert counted.validations() == 1  # that of the second epoch


class Counted(Classifier):
    """Counts its validations in a file: what is counted in memory before the training is put back."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_validation_epoch_end(self) -> None:
        with self.path.open("a") as file:
            file.write("x")

    def validations(self) -> int:
        return self.path.stat().st_size


def test_they_can_be_left_out(tmp_path: Path) -> None:
    counted = []
    for settings in ({}, {"skip_calibrated_evaluation": True}, {"skip_calibrated_evaluation": True, "skip_initial_evaluation": True}):
        cco, module = quick(training_settings={"stats_steps": 1, **settings}), Counted(tmp_path / f"validations_{len(counted)}")
        make_trainer(tmp_path, cco, num_sanity_val_steps=0).fit(module, batches(), batches(seed=5))
        counted.append((module.validations(), set(cco.calibrated_metrics)))
    assert counted == [(3, {"val_loss"}), (2, set()), (1, set())]


class Validated(Reading):
    """Notes what it validates on, too."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.seen.append(["validation", batch[1].tolist()])
        self.log("val_loss", self(batch[0] / 24).square().mean())


class Once(IterableDataset):
    """A stream that gives each sample once, over all epochs."""

    def __init__(self) -> None:
        self.left = iter(range(1000))

    def __iter__(self) -> Iterator[tuple[Tensor, int, float]]:
        for _, i in zip(range(N), self.left, strict=False):
            yield torch.linspace(-1, 1, 8) * i, i, 0.0


def loaders(kind: str) -> tuple[DataLoader, DataLoader]:
    generator, data = torch.Generator().manual_seed(7), Samples()
    train = DataLoader(data, 4, shuffle=True, generator=generator)
    if kind == "one generator for both":
        return train, DataLoader(Samples(), 4, shuffle=True, generator=generator)
    if kind == "parts of one data set that counts":
        return DataLoader(Subset(data, range(16)), 4, shuffle=True), DataLoader(Subset(data, range(16, N)), 4)
    if kind == "random augmentation":
        return train, DataLoader(Samples(augment=True), 4, shuffle=True)
    return train, DataLoader(Once(), 4)


def seen(folder: Path, kind: str, *callbacks: pl.Callback) -> list[Any]:
    pl.seed_everything(1, verbose=False)
    module = Validated()
    train, val = loaders(kind)
    make_trainer(folder, *callbacks, max_epochs=2, num_sanity_val_steps=0).fit(module, train, val)
    return [*module.seen, random.random(), float(np.random.rand()), float(torch.rand(()))]


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("kind", ["one generator for both", "parts of one data set that counts", "random augmentation", "a stream"])
def test_the_training_does_not_notice(kind: str, tmp_path: Path) -> None:
    cco: CCOCallback = quick(training_settings={"stats_steps": 2, "skip_initial_evaluation": True})
    assert seen(tmp_path, kind, cco) == seen(tmp_path, kind)
    assert set(cco.calibrated_metrics) == (set() if kind == "a stream" else {"val_loss"})


def test_a_progress_bar_that_comes_first_goes_on(tmp_path: Path) -> None:
    bar = pl.callbacks.TQDMProgressBar()
    totals: list[int] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            totals.append(bar.train_progress_bar.n if not bar.train_progress_bar.disable else -1)

    trainer = make_trainer(tmp_path, bar, quick(), Look(), enable_progress_bar=True)
    trainer.fit(Classifier(), batches(), batches(seed=5))
    assert totals == [1, 2, 3, 4]
