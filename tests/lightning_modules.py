"""Lightning pieces that the tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from models import ResidualCNN
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class Classifier(pl.LightningModule):
    """The residual CNN with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResidualCNN()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch))

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


def batches(shuffle: bool = False, seed: int = 3) -> DataLoader:
    """Four batches of eight random images."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(32, 1, 8, 8, generator=generator), torch.randint(0, 10, (32,), generator=generator)
    return DataLoader(TensorDataset(images, labels), 8, shuffle=shuffle)


def make_trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet Trainer on one CPU, one epoch unless said otherwise."""
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "default_root_dir": folder,
    }
    return pl.Trainer(**{**defaults, **options}, callbacks=list(callbacks))


class Losses(pl.Callback):
    """Keeps each training loss."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


def losses_of(folder: Path, cco: pl.Callback, epochs: int, ckpt: str | None) -> list[float]:
    """Training losses of a run that may resume from a checkpoint; it leaves ``last.ckpt``."""
    pl.seed_everything(1, verbose=False)
    losses = Losses()
    trainer = make_trainer(folder, cco, losses, ModelCheckpoint(folder, save_last=True), max_epochs=epochs)
    trainer.fit(Classifier(), batches(), batches(), ckpt_path=ckpt)
    return losses.values
