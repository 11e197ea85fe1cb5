"""Batch norms keep their statistics from a step on; the training is that of a loop that puts them into evaluation mode by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import make_trainer, quick
from test_distillation import Module, Net, assert_same, data, twins
from torch import nn
from torch.utils.data import DataLoader

from lightning_cco import CCOCallback, CCOError, quantize


class Plain(Net):
    """Without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Identity()


def callback(step: int | None) -> CCOCallback:
    return quick(training_settings={"stats_steps": 1, "freeze_ranges_at_step": 0, "freeze_batch_norm_at_step": step})


class Statistics(pl.Callback):
    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.values.append(module.net.body[1].running_mean.clone())


def by_hand(module: pl.LightningModule, freeze: int) -> pl.LightningModule:
    batches = data()
    quantized = quantize(module, {}, (batches[0][0],))
    quantized.calibrate([[batches[0][0]]])
    quantized.freeze_ranges()
    optimizer = module.configure_optimizers()
    for step, (x, y) in enumerate(batches):
        module.train()
        if step >= freeze:
            module.net.body[1].eval()
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    quantized.remove()
    return module


@pytest.mark.parametrize("step", [0, 1])
def test_a_training_with_frozen_statistics(step: int, tmp_path: Path) -> None:
    module, reference = twins(lambda: Module(Plain(), F.cross_entropy))
    cco, seen = callback(step), Statistics()
    trainer = make_trainer(tmp_path, cco, seen, val_check_interval=1)
    trainer.fit(module, DataLoader(data(), batch_size=None), DataLoader(data(), batch_size=None))
    assert torch.equal(seen.values[step], seen.values[-1])
    assert torch.equal(seen.values[0], module.net.body[1].running_mean) == (step < 2)
    assert_same(module, by_hand(reference, step))
    torch.testing.assert_close(module.net.body[1].running_mean, reference.net.body[1].running_mean)
    assert module.net.body[1].training  # as before
    assert cco.quantized is not None
    assert cco.quantized.drift == []


def test_those_that_the_user_froze_stay_frozen(tmp_path: Path) -> None:
    class Frozen(Module):
        def on_train_start(self) -> None:
            self.net.body[1].eval()

    module = Frozen(Plain(), F.cross_entropy)
    make_trainer(tmp_path, callback(1)).fit(module, DataLoader(data(), batch_size=None))
    assert not module.net.body[1].training


def test_a_resumed_run_begins_frozen(tmp_path: Path) -> None:
    module, keeper = Module(Plain(), F.cross_entropy), ModelCheckpoint(tmp_path)
    make_trainer(tmp_path, callback(2), keeper).fit(module, DataLoader(data(), batch_size=None))
    start = copy.deepcopy(module.net.body[1].running_mean)
    resumed = Module(Plain(), F.cross_entropy)
    trainer = make_trainer(tmp_path, callback(2), max_epochs=2)
    trainer.fit(resumed, DataLoader(data(), batch_size=None), ckpt_path=keeper.best_model_path)
    assert torch.equal(resumed.net.body[1].running_mean, start)
    with pytest.raises(CCOError, match="a step of at least 0"):
        callback(-1)
