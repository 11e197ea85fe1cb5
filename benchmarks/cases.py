"""The networks and batches that all benchmarks use, and a training step of each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from export_models import Decoder, MobileNetV2, ResNet18, ViT

Batch = tuple[Tensor, Tensor]
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """A network and a batch for it.

    Attributes:
        name: Network and shape of the batch.
        make: Builds the network with random weights.
        data: Draws inputs and targets.
    """

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[], Batch]

    def model(self) -> nn.Module:
        """The network in training mode, the same weights every time."""
        torch.manual_seed(0)
        return self.make().train()

    def batch(self) -> Batch:
        """Inputs and targets, the same every time."""
        torch.manual_seed(1)
        return self.data()


def images(size: int, batch: int) -> Callable[[], Batch]:
    return lambda: (torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,)))


def text(batch: int, length: int) -> Callable[[], Batch]:
    def draw() -> Batch:
        tokens = torch.randint(0, 128, (batch, length + 1))
        return tokens[:, :-1], tokens[:, 1:]

    return draw


def decoder(width: int = 128, depth: int = 6, length: int = 128) -> nn.Module:
    return Decoder(128, width, depth, length)


CASES = {
    case.name: case
    for case in (
        Case("ResNet-18 16×3×96×96", ResNet18, images(96, 16)),
        Case("MobileNetV2 16×3×96×96", MobileNetV2, images(96, 16)),
        Case("ViT-tiny 8×3×224×224", ViT, images(224, 8)),
        Case("6-layer character transformer 16×128", decoder, text(16, 128)),
    )
}


def chosen(parts: list[str]) -> list[Case]:
    """The cases whose names contain one of the parts; all of them if there are none."""
    return [case for name, case in CASES.items() if not parts or any(part.lower() in name.lower() for part in parts)]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def training_step(model: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], batch: Batch) -> Step:
    """Forward, loss, backward and a step of SGD, as one function."""
    optimizer = torch.optim.SGD(parameters, 1e-3)
    inputs, targets = batch

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model(inputs), targets).backward()
        optimizer.step()

    return step
