"""Forwards whose tensors have other sizes in training (dropped tokens, crops, selected rows, experts): the same layers, which are rounded there as well."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize


class Sized(nn.Module):
    """Takes a part of its input in training."""

    def part(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def all_of(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.all_of(self.part(x) if self.training else x)


class Tokens(Sized):
    """A transformer that drops tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.mixing, self.head = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), nn.Linear(8, 8), nn.Linear(8, 4)

    def part(self, x: Tensor) -> Tensor:
        return x[:, ::2]

    def all_of(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mixing(self.layer(x))).mean(1))


class Crops(Sized):
    """A convolutional network that crops its images."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2), nn.ReLU()
        )
        self.head = nn.Linear(4, 3)

    def part(self, x: Tensor) -> Tensor:
        return x[..., 2:-2, 2:-2]

    def all_of(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


class Rows(Sized):
    """A perceptron that learns from some samples alone, and calls one of its layers by function."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU())
        self.weight, self.head = nn.Parameter(torch.randn(16, 16) / 4), nn.Linear(16, 4)

    def part(self, x: Tensor) -> Tensor:
        return x[x.mean(-1) > 0]

    def all_of(self, x: Tensor) -> Tensor:
        return self.head(F.linear(self.layers(x), self.weight).relu())


def rounds_as_in_evaluation(model: Sized, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = quantize(model, {"global_quantization_settings": {"weights_num_bits": 4}}, (x,))
        quantized.calibrate([x])
    assert not [call for call in quantized.capture.evaluation_only if call.layer.weighted]
    part = model.part(x)
    model.eval()
    expected = model(part)
    with quantized.disabled():
        in_float = model(part)
    model.train()
    found = model(x)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert float((found - in_float).detach().norm()) > 1e-3


@pytest.mark.parametrize(
    ("kind", "shape"), [(Tokens, (4, 10, 8)), (Crops, (2, 2, 16, 16)), (Rows, (32, 8))], ids=["tokens", "crops", "rows"]
)
def test_a_part_in_training(kind: type[Sized], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    rounds_as_in_evaluation(kind(), torch.randn(shape))


class Experts(nn.Module):
    """Sends samples to experts, one of which gets all: another one in training."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.experts, self.head = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8) for _ in range(3)]), nn.Linear(8, 4)
        self.chosen = 0

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.entry(x))
        expert = torch.full((len(x),), self.chosen if self.training else 1)
        out = torch.zeros_like(features)
        for number, layer in enumerate(self.experts):
            rows = expert == number
            out[rows] = torch.relu(layer(features[rows])) * 0.5
        return self.head(out)


def test_experts_that_get_none_of_a_batch() -> None:
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(16, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = quantize(model, {"training_settings": {"range_estimator": "min_max"}}, (x,))
    with pytest.warns(UserWarning, match="nothing came out of 'relu_1', 'relu_3'"):
        quantized.calibrate([x])
    model.eval()
    expected = model(x)
    model.train()
    model.chosen = 1
    torch.testing.assert_close(model(x), expected)
    assert len(quantized.weights) == 4


def test_a_branch_of_training_alone_is_still_none_of_evaluation() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.entry, self.one, self.other, self.head = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.entry(x))
            return self.head(torch.relu(self.one(x[::2]) if self.training else self.other(x)))

    with pytest.warns(UserWarning, match="'other' run in evaluation mode alone, those in 'one' in training mode alone"):
        quantize(Branches(), None, (torch.randn(8, 8),))


class Views(nn.Module):
    """Sees each sample several times in training."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.net, self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 4)
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        views = [x, x.flip(0), x * 0.5] if self.training else [x]
        features = self.net(torch.cat(views)).split(len(x)) if self.together else [self.net(view) for view in views]
        return self.head(torch.stack(list(features)).mean(0))


def test_further_calls_in_training_are_said_to_be_in_float() -> None:
    x = torch.randn(16, 8)
    with pytest.warns(UserWarning, match=r"layers with weights in 'net\.0', 'net\.2' are called more often by a forward in training mode"):
        quantize(Views(together=False), None, (x,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = quantize(Views(together=True), None, (x,))
    assert len(quantized.weights) == 2
