"""What a loop over modules calls in each round, with its module or without: whether the module is left out changes the rounding of none of it.

The reference is the same network with the body of the loop in modules of their own.
"""

from __future__ import annotations

import warnings
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from lightning_cco import CCOWarning, QuantizedModel, quantize

COUNT = 4


class Rounds(nn.Module):
    """A loop over layers, of which training may leave some out.

    Args:
        way: What the loop computes.
        loops: Whether it does so in the forward itself; else in a module for each round.
        left_out: Numbers of the layers that a training leaves out.
    """

    def __init__(self, way: str, loops: bool, left_out: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.way, self.left_out = way, left_out
        self.entry, self.head, self.act = nn.Linear(8, 8), nn.Linear(8, 4), nn.Tanh()
        self.layers, self.others = (nn.ModuleList([nn.Linear(8, 8) for _ in range(COUNT)]) for _ in range(2))
        self.bodies = nn.ModuleList([] if loops else [Body(self, number) for number in range(COUNT)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.entry(x))
        for number in range(COUNT):
            x = self.bodies[number](x) if self.bodies else self.body(x, number)
        if self.way == "after the loop":
            x = torch.relu(x + self.entry.bias)
        return self.head(x)

    def body(self, x: Tensor, number: int) -> Tensor:
        kept = not (self.training and number in self.left_out)
        if self.way == "before each layer":
            x = torch.tanh(x)
        if kept:
            y = self.layers[number](self.before(x, number))
            if self.way == "a layer of evaluation" and not self.training:
                y = self.others[number](y)
            x = x + y * (1.0 + number)
            x = torch.relu(x) if self.way != "after each layer" else x
        return torch.tanh(x) if self.way == "after each layer" else x

    def before(self, x: Tensor, number: int) -> Tensor:
        x = x * (1.0 + 3 * number) if self.way.startswith("left out with it") else x
        return {"left out with it": torch.tanh, "left out with it, a module": self.act}.get(self.way, nn.Identity())(x)


class Body(nn.Module):
    """A round of the loop."""

    def __init__(self, whole: Rounds, number: int) -> None:
        super().__init__()
        self.whole, self.number, self.layers = [whole], number, nn.ModuleList([whole.layers[number], whole.others[number]])

    def forward(self, x: Tensor) -> Tensor:
        return self.whole[0].body(x, self.number)


def _quantized(way: str, loops: bool, captured: tuple[int, ...]) -> tuple[QuantizedModel, Tensor]:
    torch.manual_seed(0)
    x, model = torch.randn(32, 8), Rounds(way, loops, captured)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    model.train()
    return quantized, x


def _trained(quantized: QuantizedModel, x: Tensor, left_out: tuple[int, ...]) -> tuple[list[Tensor], list[tuple[float, float]]]:
    model = cast("Rounds", quantized.model)
    model.left_out = left_out
    outputs = []
    for _ in range(3):
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
        quantized.update_ranges()
    return outputs, [(float(one.min_val), float(one.max_val)) for one in quantized.activations.values()]


@pytest.mark.parametrize("captured", [(), (1,), (0, 2, 3)])
@pytest.mark.parametrize("way", ["after each layer", "before each layer", "after the loop", "a layer of evaluation"])
def test_each_round_keeps_its_own_rounding(way: str, captured: tuple[int, ...]) -> None:
    # The reference captures all layers: a body of its own that leaves its layer out in the capture is another network.
    (own, x), (reference, _) = _quantized(way, True, captured), _quantized(way, False, ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for left_out in ((), (0,), (1, 2), (3,), (0, 1, 2, 3)):
            torch.testing.assert_close(_trained(own, x, left_out), _trained(reference, x, left_out), rtol=0, atol=0)
    assert not own.drift


@pytest.mark.parametrize(("way", "named"), [("left out with it", "tanh"), ("left out with it, a module", "act")])
def test_what_comes_before_a_module_and_is_left_out_with_it_is_said(way: str, named: str) -> None:
    own, x = _quantized(way, True, ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _trained(own, x, ())
    with pytest.warns(CCOWarning, match=rf"went past a module before 'layers\.2' .* before each of its modules \('{named}'\)"):
        _trained(own, x, (1,))


def test_what_a_loop_calls_more_often_is_said() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.entry, self.head, self.steps = nn.Linear(8, 8), nn.Linear(8, 4), 2
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(COUNT)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.entry(x)
            for layer in self.layers:
                x = layer(x)
                for _ in range(self.steps):
                    x = torch.tanh(x * 2)
            return self.head(x)

    x, model = torch.randn(32, 8), Steps()
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    model.train().steps = 3
    with pytest.warns(CCOWarning, match="was called more often in 'the root module'"):
        model(x)
