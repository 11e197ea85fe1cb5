"""A step or a forward that draws random numbers, of PyTorch, Python or NumPy, draws those of a run without the callback."""

from __future__ import annotations

import random
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from lightning_modules import make_trainer, quick
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|max_epochs).*")


def _draw() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())


class Drawing(pl.LightningModule):
    """Draws in its step, and in its forward if it is ``noisy``; ``mode``: of several loaders, so that the step is what is captured."""

    def __init__(self, mode: str | None, noisy: bool) -> None:
        super().__init__()
        self.first, self.last, self.mode, self.noisy = nn.Linear(8, 8), nn.Linear(8, 2), mode, noisy
        self.drawn: list[tuple[float, float, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x + 0.01 * sum(_draw()) if self.noisy else x)))

    def training_step(self, batch: dict[str, list[Tensor]] | list[Tensor], batch_idx: int) -> Tensor:
        self.drawn.append(_draw())
        rows = [one[0] for one in batch.values()] if isinstance(batch, dict) else [batch[0]]
        return torch.stack([self(x).pow(2).mean() for x in rows]).sum()

    def train_dataloader(self) -> DataLoader | CombinedLoader:
        def loader() -> DataLoader:
            return DataLoader(TensorDataset(torch.linspace(-1, 1, 64).view(8, 8)), 2, shuffle=True)

        return loader() if self.mode is None else CombinedLoader({"a": loader(), "b": loader()}, self.mode)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize(("mode", "noisy"), [(None, True), ("min_size", False), ("max_size_cycle", True)])
def test_random_numbers_are_those_of_the_float_run(mode: str | None, noisy: bool, tmp_path: Path) -> None:
    drawn = []
    for callbacks in ([], [quick()]):
        pl.seed_everything(3, verbose=False)
        module = Drawing(mode, noisy)
        make_trainer(tmp_path, *callbacks, max_epochs=2).fit(module)
        drawn.append(module.drawn)
    assert len(drawn[0]) == 8
    assert drawn[0] == drawn[1]
