"""A checkpoint may stand after the last batch of an epoch: what is trained on afterwards is what the float run trains on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import make_trainer, quick
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_cco import CCOCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|not resumable|use of fork|max_epochs).*")
STEPS = 4


class Samples(Dataset):
    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, i: int) -> tuple[Tensor, int, float]:
        return torch.linspace(-1, 1, 8) * i, i, random.random() + float(torch.rand(()))


class Counting(IterableDataset):
    """Another order each time."""

    def __init__(self) -> None:
        self.times = 0

    def __iter__(self) -> Iterator[Any]:
        self.times += 1
        for i in range(4 * STEPS):
            yield torch.linspace(-1, 1, 8) * i, (i * (2 * self.times + 1)) % (4 * STEPS), 0.0


class Stateful:
    """Its place after the last batch is not yet that of the next epoch."""

    def __init__(self) -> None:
        self.at = self.skip = 0

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[Any]:
        start, self.skip = self.skip, 0
        for self.at in range(start + 1, STEPS + 1):
            yield torch.ones(4, 8) * self.at, torch.full((4,), self.at), torch.zeros(4)
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["at"]


class Noting(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4))
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append([self.current_epoch, batch_idx, batch[1].tolist(), batch[2].tolist()])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


SAVED: dict[str, dict[str, Any]] = {
    "after a batch": {"every_n_train_steps": STEPS, "save_on_train_epoch_end": False},
    "after an epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "after a validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
}
LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Samples(), 4, shuffle=True),
    "stream": lambda: DataLoader(Counting(), 4),
    "stateful": Stateful,
}


def resumed(folder: Path, when: str, make: Callable[[], Any], validates: bool, cco: tuple[CCOCallback, ...]) -> list[Any]:
    checkpoint = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **SAVED[when])
    validation = {"val_dataloaders": DataLoader(Samples(), 8)} if validates else {}
    seen = []
    for ckpt_path in (None, folder / f"step={STEPS}.ckpt"):
        pl.seed_everything(1, verbose=False)
        model, own = Noting(), list(cco[len(seen) : len(seen) + 1])
        trainer = make_trainer(folder, *([] if ckpt_path else [checkpoint]), *own, max_epochs=3 if ckpt_path else 1, num_sanity_val_steps=0)
        trainer.fit(model, make(), ckpt_path=ckpt_path, **validation)
        seen.append(model.seen)
    return seen


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("when", "validates"), [("after a batch", False), ("after a batch", True), ("after an epoch", False), ("after a validation", True)]
)
def test_each_epoch_is_that_of_the_float_run(loader: str, when: str, validates: bool, tmp_path: Path) -> None:
    expected = resumed(tmp_path / "float", when, LOADERS[loader], validates, ())
    assert len(expected[1]) >= STEPS
    assert resumed(tmp_path / "cco", when, LOADERS[loader], validates, (quick(), quick())) == expected
