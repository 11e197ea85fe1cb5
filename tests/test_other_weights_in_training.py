"""Models that run other weights in training mode than in evaluation mode: what is trained would be in float without a word."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning_modules import QUICK, make_trainer, quick
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_cco import CCOCallback, CCOWarning, quantize


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


class Averaged(pl.LightningModule):
    """Evaluates a copy with averaged weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if self.training else self.ema(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self(batch[0]).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class AveragedByTorch(Averaged):
    def __init__(self) -> None:
        super().__init__()
        self.ema = AveragedModel(self.net)  # type: ignore[assignment]


class Merged(nn.Module):
    """Two branches in training, one convolution with the sum of their weights in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.head(F.relu(self.wide(x) + self.narrow(x)))
        return self.head(F.relu(F.linear(x, self.wide.weight + self.narrow.weight, self.wide.bias + self.narrow.bias)))


class WrittenTwice(nn.Module):
    """One weight, multiplied at one place in training and at another in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = F.linear(x + 0.1 * torch.randn_like(x), self.weight)
        else:
            x = F.linear(x, self.weight)
        return self.head(F.relu(x))


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.relu(self.body(x))
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


class Refined(Auxiliary):
    """Has another layer at the end in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(F.relu(self.body(x)))
        return x if self.training else x + self.auxiliary(x.new_zeros(len(x), 16))


class Checkpointed(Auxiliary):
    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.body, x, use_reentrant=False) if self.training else self.body(x)
        return self.head(F.relu(x))


class LayerDrop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            if not self.training or number % 2:
                x = x + F.relu(block(x))
        return self.head(x)


SAID = {
    Averaged: r"in 'ema.0', 'ema.2', 'ema.4' run in evaluation mode alone, those in 'net.0', 'net.2', 'net.4' in training mode alone",
    AveragedByTorch: r"in 'ema.module.0', .* run in evaluation mode alone, those in 'net.0'",
    Merged: r"in 'the model itself' run in evaluation mode alone, those in 'wide', 'narrow'",
    WrittenTwice: r"in 'the model itself' run in evaluation mode alone, those in 'the model itself'",
}


@pytest.mark.parametrize("kind", SAID)
def test_both_are_named(kind: type[nn.Module]) -> None:
    with pytest.warns(CCOWarning, match=SAID[kind]):
        quantize(kind(), None, (torch.randn(4, 8),))


@pytest.mark.parametrize("kind", [Auxiliary, Refined, Checkpointed, LayerDrop])
def test_what_one_mode_has_beside_the_other_is_not(kind: type[nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CCOWarning)
        quantize(kind(), None, (torch.randn(4, 8),))


def losses(folder: Path, *callbacks: pl.Callback) -> list[float]:
    torch.manual_seed(0)
    model = Averaged()
    make_trainer(folder, *callbacks).fit(model, DataLoader(TensorDataset(torch.randn(16, 8)), 4))
    return model.losses


def test_the_way_out_trains_with_rounded_values(tmp_path: Path) -> None:
    """By the reference of the float run: with the copy captured the losses are those, with the trained network they are not."""
    in_float = losses(tmp_path)
    with pytest.warns(CCOWarning, match="forward_fn"):
        assert losses(tmp_path, quick()) == in_float
    cco = CCOCallback(QUICK, forward_fn=lambda module, batch: module.net(batch[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CCOWarning)
        assert losses(tmp_path, cco) != in_float
