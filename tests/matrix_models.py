"""The models of the matrix that are written here: one small model for each way of writing a model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from export_models import LSTMClassifier, MobileNetV2, ResNet18, UNet
from matrix_case import Case, image, tokens
from torch import Tensor, nn


class DenseNet(nn.Module):
    """Each layer reads the concatenation of all before it."""

    def __init__(self, width: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(width * (i + 1)), nn.ReLU(inplace=True), nn.Conv2d(width * (i + 1), width, 3, padding=1, bias=False)
            )
            for i in range(depth)
        )
        self.norm, self.head = nn.BatchNorm2d(width * (depth + 1)), nn.Linear(width * (depth + 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        x = F.relu(self.norm(torch.cat(features, 1)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Autoencoder(nn.Module):
    """No forward of its own: the step calls encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16))


class GAN(nn.Module):
    """Two networks; the step calls the discriminator twice."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 16), nn.Tanh())
        self.discriminator = nn.Sequential(nn.Linear(16, 8), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(8, 1))


class Attention(nn.Module):
    """`nn.MultiheadAttention` twice: to itself with the weights asked for, and to another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=6)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        attended, weights = self.own(x, x, x)
        x = x + attended
        x = x + self.cross(x, memory, memory, need_weights=False)[0]
        return self.head(x), weights


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with a padding mask."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options), 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, words: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.body(self.embedding(words), src_key_padding_mask=padding))


class GRUModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gru = nn.Linear(6, 8), nn.GRU(8, 8, num_layers=2, bidirectional=True, dropout=0.1, batch_first=True)
        self.hidden, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, last = self.gru(torch.relu(self.inner(x)))
        return self.head(torch.relu(self.hidden(states.mean(1) + torch.cat([last[-1], last[-2]], 1))))


class LSTMCells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, c = x.new_zeros(x.shape[0], 8), x.new_zeros(x.shape[0], 8)
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
        return self.head(h)


class Upsampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up1 = nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.norm, self.up2 = nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.head(F.relu6(self.up2(F.relu(self.norm(self.up1(x)))))))


def convolutions(dimensions: int) -> nn.Module:
    """Plain, grouped, depthwise and dilated convolutions of 1 or 3 dimensions."""
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dimensions]
    norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dimensions]
    pool = {1: nn.AvgPool1d, 3: nn.AvgPool3d}[dimensions]
    body = [conv(2, 4, 3, padding=1), norm(4), nn.ReLU(), conv(4, 8, 3, padding=2, dilation=2, groups=2), nn.Hardswish()]
    return nn.Sequential(*body, conv(8, 8, 3, padding="same", groups=8), pool(2), conv(8, 4, 1), nn.Flatten(), nn.LazyLinear(3))


def padded_tokens() -> tuple[Tensor, ...]:
    return torch.randint(0, 20, (3, 6)), torch.arange(6) >= torch.tensor([[6], [4], [5]])


def gan_step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model.discriminator(batch[0]), model.discriminator(model.generator(batch[1]))


CASES = [
    Case("resnet", lambda: ResNet18(4, 5), image(4, 3, 32, 32)),
    Case("mobilenet_v2", lambda: MobileNetV2(((1, 8, 1, 1), (6, 12, 2, 2)), 32, 5), image(4, 3, 16, 16)),
    Case("densenet", DenseNet, image(4, 3, 8, 8)),
    Case("unet", lambda: UNet(4), image(2, 3, 16, 16)),
    Case("autoencoder", Autoencoder, image(4, 16), run=lambda model, batch: model.decoder(model.encoder(batch[0]))),
    Case("gan", GAN, lambda: (torch.randn(4, 16), torch.randn(4, 4)), run=gan_step, twice=True),
    Case("multihead_attention", Attention, lambda: (torch.randn(2, 5, 8), torch.randn(2, 7, 6))),
    Case("transformer_encoder", Encoder, tokens(3, 6)),
    Case("transformer_encoder_padded", lambda: Encoder(norm_first=True, activation="gelu"), padded_tokens),
    Case("lstm", LSTMClassifier, tokens(3, 6)),
    Case("gru", GRUModel, image(3, 5, 6)),
    Case("lstm_cells", LSTMCells, image(3, 4, 6)),
    Case("conv_transpose", Upsampler, image(2, 4, 4, 4)),
    Case("conv1d", lambda: convolutions(1), image(3, 2, 8)),
    Case("conv3d", lambda: convolutions(3), image(3, 2, 4, 4, 4)),
]
