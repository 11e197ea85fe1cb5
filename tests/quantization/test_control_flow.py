"""Operators that take functions (`torch.cond`, `scan`): what these call runs in float with a word, and is trained as in the float model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from lightning_cco import quantize
from lightning_cco.errors import CCOWarning


class Chooses(nn.Module):
    """One of two layers, by `torch.cond`, which traces both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.cond(x.sum() > 0, lambda x: torch.relu(self.one(x)), lambda x: torch.relu(self.other(x)), (x,)))


class Repeats(nn.Module):
    """A layer for each step of a sequence, by `scan`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.last = nn.Linear(8, 8), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        def step(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.tanh(self.one(torch.cat([state, x], 1))), x * 1.0

        x = torch.relu(self.first(x)).unsqueeze(0).repeat(3, 1, 1)
        return self.last(scan(step, torch.zeros_like(x[0]), x)[0])


# The compiler looks at the gradients of its inputs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
@pytest.mark.parametrize("model_class", [Chooses, Repeats])
def test_bodies_of_control_flow_run_in_float(model_class: type[nn.Module]) -> None:
    torch._dynamo.reset()
    model, x = model_class(), torch.randn(6, 8)
    plain = copy.deepcopy(model)
    with pytest.warns(CCOWarning, match="'one'"):
        quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    assert {"linear"} <= quantized.plan.quantized
    found, expected = model(x), plain(x)
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()
    found.square().mean().backward()
    expected.square().mean().backward()
    for (name, parameter), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (reference.grad is None), name
        if parameter.grad is not None:
            assert (parameter.grad - reference.grad).norm() <= 0.1 * reference.grad.norm(), name
    assert quantized.drift == []
    torch._dynamo.reset()
