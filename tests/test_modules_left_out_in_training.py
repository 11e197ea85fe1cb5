"""Stochastic depth by leaving modules out: what is computed between modules is told apart by its order, so ranges are mixed up; that is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_cco import CCOWarning, QuantizedModel, quantize


class Block(nn.Module):
    """A residual block that adds by itself."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = nn.Linear(8, 8), factor

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.layer(x)) * self.factor


class Depth(nn.Module):
    """Leaves modules out in training; the residual additions are in its own forward, or in the modules."""

    def __init__(self, adds: bool = True, left_out: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.adds, self.left_out, self.most = adds, left_out, 4
        self.entry, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) if adds else Block(1.0 + i) for i in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.entry(x))
        for number, layer in enumerate(self.layers):
            if self.training and (number in self.left_out or number >= self.most):
                continue
            x = x + layer(x) * (1.0 + number) if self.adds else layer(x)
        return self.head(x)


def calibrated(model: Depth, x: Tensor) -> QuantizedModel:
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    model.train()
    return quantized


def test_what_is_told_by_order_alone() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(32, 8), Depth()
    quantized = calibrated(model, x)
    before = {key: float(quantizer.max_val) for key, quantizer in quantized.activations.items()}
    model.left_out = (0, 1)
    with pytest.warns(CCOWarning, match=r"past 'layers\.0', and on with later modules .* Calls of 'mul', 'add' in 'the root module'"):
        model(x)
    for _ in range(50):
        model(x)
        quantized.update_ranges()
    assert any(float(quantizer.max_val) > 1.5 * before[key] for key, quantizer in quantized.activations.items())  # what is warned of


@pytest.mark.parametrize("left_out", [(0,), (1, 2), (3,)])
def test_modules_that_are_left_out_as_a_whole(left_out: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(32, 8), Depth(adds=False)
    calibrated(model, x)
    model.left_out = left_out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).sum().backward()


def test_a_loop_that_ends_earlier() -> None:
    x, model = torch.randn(32, 8), Depth()
    calibrated(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for most in (4, 3, 1):
            model.most = most
            model(x).sum().backward()


class Unrolled(nn.Module):
    """A recurrence over as many steps as a sequence has, between other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.cell, self.step, self.drop, self.head = (
            nn.LayerNorm(8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Dropout(0.1),
            nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        state = torch.relu(self.cell(self.norm(x[:, 0])))
        for number in range(1, x.shape[1]):
            state = torch.relu(self.cell(x[:, number]) + self.step(state))
        return self.head(self.drop(state))


def test_shorter_sequences() -> None:
    model = Unrolled()
    quantized = quantize(model, None, (torch.randn(8, 6, 8),))
    quantized.calibrate([torch.randn(8, 6, 8)])
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in (6, 4, 2):
            model(torch.randn(8, length, 8)).sum().backward()
