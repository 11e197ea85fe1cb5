"""The models of the matrix that show ways of writing a forward rather than an architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from matrix_case import Case, image, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Parametrized(nn.Module):
    """Weights that are computed from other parameters at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1))
        self.spectral = parametrizations.spectral_norm(nn.Linear(4, 6), n_power_iterations=50)
        self.orthogonal = parametrizations.orthogonal(nn.Linear(6, 6, bias=False))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.normed(x)).mean((2, 3))
        return self.head(F.relu(self.orthogonal(F.relu(self.spectral(x)))))


class TiedEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(words))))


class DataDependentLoop(nn.Module):
    """As many steps as the data say."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(int(steps.max())):
            x = x + torch.tanh(self.cell(x))
        return self.head(x)


class TrainingBranch(nn.Module):
    """Training adds operations of the same kinds before, between and in place after those of evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.auxiliary = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.training:
            x = x + 3.0
            x = x - 3.0
        y = self.fc1(x)
        if self.training:
            y += 0.0
        y = y + x
        z = F.relu(self.fc2(y))
        if self.training:
            z = z * 1.0
        z = z * 0.5
        return (self.head(z), self.auxiliary(F.relu(z))) if self.training else self.head(z)


class PlainParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8))
        self.scale, self.projection = nn.Parameter(torch.rand(8)), nn.Parameter(torch.randn(8, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, self.weight, bias=self.bias)) * self.scale
        return self.head(F.relu(x @ self.projection))


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(-1, 1) + 0.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = Clipped.apply(self.fc1(x))
        y = self.fc2(y) + y
        return self.head(torch.clamp(y, -2.0, 2.0))


class Einsum(nn.Module):
    """Attention written with einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Parameter(0.3 * torch.randn(3, 8, 2, 4)), nn.Parameter(0.3 * torch.randn(2, 4, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.einsum("btc,zchd->zbthd", x, self.qkv).unbind(0)
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        attended = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        return self.head(torch.einsum("bqhd,hdc->bqc", attended, self.out) + x)


class InPlace(nn.Module):
    """The results of in-place operations are dropped, and the tensors go on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Linear(4, 4) for _ in range(4))
        self.dropout, self.head = nn.Dropout(0.1, inplace=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        y.add_(self.fc2(x))
        y.mul_(0.5)
        torch.relu_(y)
        z = self.fc3(y)
        z.exp_()
        w = self.fc4(z)
        w[:, 0] = 0.5
        w[:, 1:3] += 1.0
        self.dropout(w)
        return self.head(w)


class Spectral(nn.Module):
    """Complex numbers on the way, seen through ``abs``, ``.real`` and ``view_as_real``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 8), nn.Linear(5, 6), nn.Linear(5, 6)
        self.mix, self.head = nn.Linear(10, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(torch.relu(self.fc1(x)))
        pairs = torch.view_as_real(spectrum).flatten(1)
        return self.head(self.fc2(spectrum.abs()) + self.fc3(spectrum.real) + self.mix(pairs))


class FromIntegers(nn.Module):
    """Integer images, a one-hot label and a counter buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.label = nn.Conv2d(3, 4, 3), nn.Linear(4, 6), nn.Linear(5, 6)
        self.head = nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, pixels: Tensor, label: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        x = F.relu(self.conv(pixels.float() / 255)).mean((2, 3))
        scores = self.head(self.fc(x) + self.label(F.one_hot(label, 5).float()))
        return {"scores": scores, "best": scores.argmax(1)}


@dataclass
class Detection:
    boxes: Tensor
    extra: dict[str, Any]


class Nested(nn.Module):
    """A dataclass that holds a dictionary that holds a list."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.boxes, self.scores = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, features: dict[str, Any]) -> Detection:
        x = F.relu(self.body(features["a"] + features["rest"][0]))
        return Detection(self.boxes(x).sigmoid(), {"scores": [self.scores(x)], "features": (x, None, "name")})


class FrozenBackbone(nn.Module):
    """The backbone stays in evaluation mode and is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 8, 3), nn.ReLU())
        self.neck, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenBackbone:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.neck(self.backbone(x).mean((2, 3)))))


class LoRALinear(nn.Linear):
    """A frozen weight and a low-rank correction beside it."""

    def __init__(self, features: int, out: int, rank: int = 2, merged: bool = False) -> None:
        super().__init__(features, out)
        self.merged = merged
        self.down, self.up = nn.Parameter(0.1 * torch.randn(rank, features)), nn.Parameter(0.1 * torch.randn(out, rank))
        self.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.weight + self.up @ self.down, self.bias)
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up) * 0.5


def lora() -> nn.Module:
    return nn.Sequential(LoRALinear(4, 8), nn.ReLU(), LoRALinear(8, 8, merged=True), nn.ReLU(), nn.Linear(8, 2))


def steps(*counts: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(len(counts), 4), torch.tensor(counts))


CASES = [
    Case("parametrized", Parametrized, image(3, 3, 6, 6)),
    Case("tied_embeddings", TiedEmbeddings, tokens(3, 6)),
    Case("data_dependent_loop", DataDependentLoop, steps(1, 3, 2), other_batch=steps(5, 1, 1)),
    Case("training_branch", TrainingBranch, image(5, 4)),
    Case("plain_parameter", PlainParameter, image(5, 4)),
    Case("custom_function", CustomFunction, image(5, 4)),
    Case("einsum", Einsum, image(2, 5, 8)),
    Case("in_place", InPlace, image(5, 4)),
    Case("complex", Spectral, image(4, 8)),
    Case("integers", FromIntegers, lambda: (torch.randint(0, 256, (3, 3, 6, 6), dtype=torch.uint8), torch.randint(0, 5, (3,)))),
    Case("nested", Nested, lambda: ({"a": torch.randn(3, 4), "rest": [torch.randn(3, 4), "unused"]},)),
    Case("frozen_backbone", FrozenBackbone, image(3, 3, 8, 8)),
    Case("lora", lora, image(5, 4)),
]
