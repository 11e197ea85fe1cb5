"""Fashion-MNIST and the three small networks that the accuracy at few bits is measured with."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
TRAINING_IMAGES = 20_000
_FILES = {"train": "train", "test": "t10k"}
_MEAN, _DEVIATION = 0.2860, 0.3530


@dataclass(frozen=True)
class Images:
    """Images, (n, 1, 28, 28) float32, and their classes, (n,) int64, for training and for the test."""

    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor


def load_images(folder: Path) -> Images:
    """Read the four files of Fashion-MNIST: the first 20,000 images for training, all 10,000 of the test.

    Raises:
        SystemExit: They are not there; the message says where to get them.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, prefix in _FILES.items():
        try:
            pixels = _idx(folder / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
            classes = _idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 8)
        except OSError as error:
            raise SystemExit(
                f"{error}. Expected the four .gz files of Fashion-MNIST in {folder}: install Debian's package dataset-fashion-mnist "
                "(apt-get install dataset-fashion-mnist), or give the folder that holds them: --data FOLDER."
            ) from error
        found[name] = (pixels.float() / 255 - _MEAN) / _DEVIATION, classes.long()
    (train, train_classes), (test, test_classes) = found["train"], found["test"]
    return Images(train[:TRAINING_IMAGES], train_classes[:TRAINING_IMAGES], test, test_classes)


def _idx(path: Path, header: int) -> Tensor:
    with gzip.open(path) as file:
        return torch.frombuffer(bytearray(file.read()[header:]), dtype=torch.uint8)


class Residual(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which is a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """A wider 1×1 convolution, a depthwise one, and a narrow 1×1 one; beside a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, widening: int) -> None:
        super().__init__()
        hidden = inputs * widening
        self.body = nn.Sequential(
            *_conv(inputs, hidden, 1),
            *_conv(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.same else self.body(x)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU6()]


class TransformerBlock(nn.Module):
    """Attention of 4 heads and two linear layers, each after a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind()
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Three blocks on 49 patches of 4×4 pixels; the mean of the patches is classified."""

    def __init__(self, width: int = 48, depth: int = 3) -> None:
        super().__init__()
        self.patches, self.positions = nn.Conv2d(1, width, 4, 4), nn.Parameter(torch.randn(49, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def resnet() -> nn.Module:
    """77,754 parameters."""
    blocks = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]
    stem = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mobilenet() -> nn.Module:
    """36,122 parameters."""
    shapes = [(16, 24, 2, 4), (24, 24, 1, 4), (24, 40, 2, 4), (40, 40, 1, 4)]
    blocks = [InvertedResidual(*shape) for shape in shapes]
    stem, head = _conv(1, 16, 3), _conv(40, 80, 1)
    return nn.Sequential(*stem, *blocks, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(80, 10))


NETWORKS = {"resnet": ("ResNet", resnet), "mobilenet": ("MobileNetV2", mobilenet), "vit": ("ViT", ViT)}
