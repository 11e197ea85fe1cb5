"""A tensor that is rounded at its readers is still somebody else's: it may be overwritten before the backward, where the float model allows it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from lightning_cco import quantize


class Overwritten(nn.Module):
    """An addition, whose gradient needs neither operand; one of them is read by a hook, and overwritten afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.head = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        total = a + self.other(x)
        a.relu_()
        return self.head(torch.relu(total) + a)


@pytest.mark.parametrize("estimator", ["moving_average", "learned"])
def test_the_gradient_needs_nothing_that_is_overwritten(estimator: str) -> None:
    torch.manual_seed(0)
    model, x, seen = Overwritten(), torch.randn(16, 4), list[Tensor]()
    plain = copy.deepcopy(model)
    model.first.register_forward_hook(lambda _, __, result: seen.append(result))
    quantized = quantize(model, {"training_settings": {"range_estimator": estimator}}, (x,))
    quantized.calibrate([[x]])
    assert quantized.graph["linear"].read_out
    model.train()
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for (name, trained), (_, expected) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert trained.grad is not None
        assert expected.grad is not None
        assert cosine_similarity(trained.grad.flatten(), expected.grad.flatten(), dim=0) > 0.95, (
            name
        )  # a value near 0 may fall on the other side of a ReLU
