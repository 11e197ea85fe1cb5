"""Lightning pieces that the tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from models import ResidualCNN
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_cco import CCOCallback

QUICK: dict[str, Any] = {"training_settings": {"stats_steps": 2}, "monitoring_settings": {"draw_graph": False}}


def quick(**more: Any) -> CCOCallback:
    """A callback that calibrates on two batches and draws nothing."""
    return CCOCallback({**QUICK, **more})


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


class RangesMoved(pl.Callback):
    """Tells whether the ranges followed the training batches: they do only if the quantizers ran in the training step. Goes after CCOCallback."""

    def __init__(self, cco: CCOCallback) -> None:
        self.cco = cco
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}

    def _ranges(self) -> dict[str, Tensor]:
        return {key: torch.stack([q.min_val, q.max_val]).cpu() for key, q in self.cco.quantized.activations.items()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.before = self._ranges()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.after = self._ranges()

    @property
    def still(self) -> list[str]:
        """Quantizers whose range is as it was."""
        return [key for key, before in self.before.items() if torch.equal(before, self.after[key])]


@dataclass
class Run:
    """What a fit left behind."""

    model: pl.LightningModule
    cco: CCOCallback
    losses: list[float]
    ranges: RangesMoved
    trainer: pl.Trainer


def run_fit(
    folder: Path,
    make: Callable[[], Any],
    *callbacks: pl.Callback,
    train: Any = None,
    val: Any = None,
    cco: CCOCallback | None = None,
    **options: Any,
) -> Run:
    """Make a module and fit it with a CCOCallback, from the same random state each time."""
    pl.seed_everything(1, verbose=False)
    model, cco = make(), cco or quick()
    losses, moved = Losses(), RangesMoved(cco)
    trainer = make_trainer(folder, cco, losses, moved, *callbacks, **options)
    trainer.fit(model, train if train is not None else batches(), val)
    return Run(getattr(model, "_orig_mod", model), cco, losses.values, moved, trainer)


def plain_losses(folder: Path, make: Callable[[], Any], train: Any = None, **options: Any) -> list[float]:
    """Losses of the same training without the callback."""
    pl.seed_everything(1, verbose=False)
    losses = Losses()
    make_trainer(folder, losses, **options).fit(make(), train if train is not None else batches())
    return losses.values


def assert_quantized(run: Run, *inputs: Any, unmoved: int = 0) -> None:
    """The run trained a fake-quantized model, nothing drifted, and the model is still the plain one with hooks on it."""
    quantized = run.cco.quantized
    assert quantized is not None
    assert quantized.model is run.model
    assert quantized.plan.quantized
    assert quantized.drift == []
    assert len(run.ranges.before) > 0
    assert len(run.ranges.still) <= unmoved, run.ranges.still
    assert run.cco.report is not None
    assert run.cco.report.local
    assert_acts(run.cco, *inputs)


def assert_acts(cco: CCOCallback, *inputs: Any) -> None:
    """The outputs are not the float model's, and no function mode is left active."""
    model = cco.quantized.model.eval()
    inputs = inputs or (batches().dataset.tensors[0],)
    with torch.no_grad():
        quantized = _first(model(*inputs))
        with cco.quantized.disabled():
            plain = _first(model(*inputs))
    assert torch.isfinite(quantized).all()
    assert not torch.equal(quantized, plain)
    assert torch._C._len_torch_function_stack() == 0


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else next(iter(output.values() if isinstance(output, dict) else output))


def losses_of(folder: Path, cco: pl.Callback, epochs: int, ckpt: str | None) -> list[float]:
    """Training losses of a run that may resume from a checkpoint; it leaves ``last.ckpt``."""
    pl.seed_everything(1, verbose=False)
    losses = Losses()
    trainer = make_trainer(folder, cco, losses, ModelCheckpoint(folder, save_last=True), max_epochs=epochs)
    trainer.fit(Classifier(), batches(), batches(), ckpt_path=ckpt)
    return losses.values
