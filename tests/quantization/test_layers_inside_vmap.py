"""Layers inside `torch.func.vmap` (ensembles of stacked weights) are measured as any other: what is kept of their calls outlives the transform."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.errors import CCOWarning


class Stacked(nn.Module):
    """Three networks as one function of their stacked weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Parameter(torch.randn(3, *shape) / 3) for shape in ((8, 16), (16, 8), (8, 3)))

    def forward(self, x: Tensor) -> Tensor:
        def one(first: Tensor, second: Tensor, last: Tensor) -> Tensor:
            return F.linear(F.relu(F.linear(F.relu(F.linear(x, first.t())), second.t())), last.t())

        return torch.func.vmap(one)(self.first, self.second, self.last).mean(0)


class Openly(Stacked):
    """The same one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        rows = [F.relu(F.linear(x, weight.t())) for weight in self.first]
        rows = [F.relu(F.linear(row, weight.t())) for row, weight in zip(rows, self.second, strict=True)]
        return torch.stack([F.linear(row, weight.t()) for row, weight in zip(rows, self.last, strict=True)]).mean(0)


def test_sensitivity_is_that_of_all_calls_together() -> None:
    model, openly, x = Stacked(), Openly(), torch.randn(16, 8)
    openly.load_state_dict(model.state_dict())
    reports = []
    for one in (model, openly):
        quantized = quantize(one, None, (x,))
        quantized.calibrate([x])
        reports.append(quantized.sensitivity([x]))
    stacked, parts = reports
    assert set(stacked.local) == set(stacked.accumulated) == {"input_0", "linear", "relu", "linear_1", "relu_1"}
    assert stacked.local["input_0"].qs == pytest.approx(parts.local["input_0"].qs, rel=1e-4)
    # The error of rounded weights is that of all three: each has scales of its own in both.
    expected = sum(parts.local[f"linear{suffix}"].qs ** 2 for suffix in ("", "_1", "_2")) / 3
    assert stacked.local["linear"].qs ** 2 / 3 == pytest.approx(expected, rel=0.2)


def test_what_can_not_be_measured_inside_is_left_out() -> None:
    model, x = Stacked(), torch.randn(16, 8)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    loss: Callable[[nn.Module, Tensor], Tensor] = lambda model, batch: model(batch).square().mean()  # noqa: E731
    with pytest.warns(CCOWarning, match="no gradient came back to 'linear', 'linear_1'"):
        assert quantized.loss_sensitivity([x], loss=loss).rises(quantized.plan) == {}
    quantized.remove()
    quantized = quantize(model, {"training_settings": {"bias_correction": True}}, (x,))
    with pytest.warns(CCOWarning, match="'linear', 'linear_1' is not known.*inside of a vmap"):
        quantized.calibrate([x])
    assert quantized.corrections == {}
