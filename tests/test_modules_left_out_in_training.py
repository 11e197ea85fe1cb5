"""Stochastic depth by leaving modules out: what the loop itself computes with each module's result keeps its own rounding.

The reference is the same network with these calls inside of its modules, which are left out as a whole.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_cco import QuantizedModel, quantize

COUNT = 4


class Block(nn.Module):
    """A residual block that adds by itself."""

    def __init__(self, layer: nn.Module, factor: float, adds: bool = True) -> None:
        super().__init__()
        self.layer, self.factor, self.adds = layer, factor, adds

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.layer(x) * self.factor) if self.adds else torch.relu(self.layer(x))


class Depth(nn.Module):
    """Leaves modules out in training; the residual additions are in its own forward, or in the modules.

    Args:
        adds: Whether they are in its own.
        way: What its loop is like.
        left_out: Numbers of the modules that a training leaves out.
    """

    def __init__(self, adds: bool = True, way: str = "", left_out: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.adds, self.way, self.left_out, self.most = adds, way, left_out, COUNT
        self.entry, self.head, self.noise, self.act = nn.Linear(8, 8), nn.Linear(8, 4), nn.Dropout(0.0), nn.ReLU()
        layers = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8) if way == "norm" else nn.ReLU()) for _ in range(COUNT)]
        self.layers = nn.ModuleList(
            layers if adds else [Block(layer, 1.0 + k, way != "shared activation alone") for k, layer in enumerate(layers)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.entry(x))
        for number, layer in enumerate(self.layers):
            if self.training and (number in self.left_out or number >= self.most):
                continue
            x = self.step(x, layer, number) if self.adds else layer(x)
        return self.head(x)

    def step(self, x: Tensor, layer: nn.Module, number: int) -> Tensor:
        y = checkpoint(layer, x, use_reentrant=False) if self.way == "checkpointed" and self.training else layer(x)
        if self.way == "dropout of training" and self.training:
            y = self.noise(y)
        if self.way == "dropout":
            y = self.noise(y)
        if self.way == "shared activation alone":
            return self.act(y)
        return self.act(x + y * (1.0 + number)) if self.way == "shared activation" else torch.relu(x + y * (1.0 + number))


WAYS = ("", "norm", "dropout", "dropout of training", "checkpointed", "shared activation", "shared activation alone")


def _twins(way: str, captured: tuple[int, ...] = ()) -> tuple[list[QuantizedModel], Tensor]:
    """The network with additions of its own, and that with additions in its modules; the capture in training mode leaves modules out, too."""
    torch.manual_seed(0)
    x, found = torch.randn(32, 8), []
    models = Depth(True, way, captured), Depth(False, way, captured)
    weights = [parameter.detach().clone() for parameter in models[0].parameters()]
    for model in models:
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.data.copy_(weight)
        quantized = quantize(model, None, (x,))
        quantized.calibrate([x])
        model.train()
        found.append(quantized)
    return found, x


def _trained(
    quantized: QuantizedModel, x: Tensor, left_out: tuple[int, ...]
) -> tuple[list[Tensor], list[Tensor], dict[str, tuple[float, float]]]:
    model = cast("Depth", quantized.model)
    model.left_out = left_out
    outputs = []
    for _ in range(3):
        model.zero_grad()
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
        quantized.update_ranges()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return outputs, gradients, {name: (float(one.min_val), float(one.max_val)) for name, one in quantized.activations.items()}


@pytest.mark.parametrize("captured", [(), (1,), (0, 2, 3)])
@pytest.mark.parametrize("way", WAYS)
def test_each_call_keeps_its_own_rounding(way: str, captured: tuple[int, ...]) -> None:
    (own, reference), x = _twins(way, captured)
    assert set(own.plan.quantized) == set(reference.plan.quantized)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for left_out in ((), (0,), (1, 2), (3,), (0, 1, 2, 3)):
            torch.testing.assert_close(_trained(own, x, left_out), _trained(reference, x, left_out), rtol=0, atol=0)
    assert not own.drift


def test_the_file_is_the_same(tmp_path: Path) -> None:
    (own, reference), x = _twins("", (1, 2))
    for quantized in (own, reference):
        _trained(quantized, x, (0,))
        quantized.model.eval()
    reports = [quantized.export(tmp_path / "a.onnx") for quantized in (own, reference)]
    assert reports[0].integer_nodes == reports[1].integer_nodes
    assert min(report.sqnr_db for report in reports) > 45


@pytest.mark.slow
def test_compiled() -> None:
    (own, reference), x = _twins("")
    compiled = torch.compile(own.model, backend="aot_eager")
    for left_out in ((), (0, 2)):
        cast("Depth", own.model).left_out = cast("Depth", reference.model).left_out = left_out
        torch.testing.assert_close(compiled(x), reference.model(x))


def test_a_loop_that_ends_earlier() -> None:
    (own, _), x = _twins("")
    model = cast("Depth", own.model)
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
        return self.head(self.drop(state).mean(1, keepdim=True).expand(-1, 8))


def test_shorter_sequences() -> None:
    model = Unrolled()
    quantized = quantize(model, None, (torch.randn(8, 6, 8),))
    quantized.calibrate([torch.randn(8, 6, 8)])
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in (6, 4, 2):
            model(torch.randn(8, length, 8)).sum().backward()


def test_longer_sequences_are_said() -> None:
    model = Unrolled()
    quantized = quantize(model, None, (torch.randn(8, 4, 8),))
    quantized.calibrate([torch.randn(8, 4, 8)])
    model.train()
    with pytest.warns(UserWarning, match="runs in float|run in float"):
        model(torch.randn(8, 6, 8)).sum().backward()
