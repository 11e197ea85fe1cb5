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


def text(batch: int, length: int, vocabulary: int = 128) -> Callable[[], Batch]:
    def draw() -> Batch:
        tokens = torch.randint(0, vocabulary, (batch, length + 1))
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


class Bottleneck(nn.Module):
    """Three convolutions and a way around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and channels == out
        self.downsample = None if same else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResNet50(ResNet18):
    """The published net with blocks of three convolutions."""

    def __init__(self, depths: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> None:
        super().__init__(classes=classes)
        blocks, channels = [], 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            for number in range(depth):
                blocks.append(Bottleneck(channels, width, 2 if stage and not number else 1))
                channels = 4 * width
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(channels, classes)


def vit_b() -> nn.Module:
    return ViT(width=768, depth=12, heads=12)


IMAGENET = (
    Case("ResNet-50 64×3×224×224", ResNet50, images(224, 64)),
    Case("ViT-B 64×3×224×224", vit_b, images(224, 64)),
)


def language_model(vocabulary: int = 50257, width: int = 768, depth: int = 12, length: int = 1024, heads: int = 12) -> nn.Module:
    """A decoder of GPT-2's sizes, 124 million parameters: the head is tied to the embedding."""
    model = Decoder(vocabulary, width, depth, length, heads)
    model.head.weight = model.embedding.weight
    return model


LANGUAGE = Case("decoder of 124 million 8×1024", language_model, text(8, 1024, 50257))


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
