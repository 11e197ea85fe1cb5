"""A loop that leaves blocks out in training, compiled: equal to the last bit to the same loop run eagerly, whatever the capture's forward left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_cco import quantize

ALL = (True, True, True, True)
LATER = [ALL, (True, False, True, False), (False, False, True, True), (True, True, True, False)]


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)
        self.blocks, self.kept = nn.ModuleList(nn.Linear(8, 8) for _ in ALL), ALL

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block, kept in zip(self.blocks, self.kept, strict=True):
            if self.training and not kept:
                continue
            x = torch.relu(block(x)) + x
        return self.last(x)


def outputs(captured: tuple[bool, ...], compiled: bool) -> list[Tensor]:
    torch._dynamo.reset()
    model, x = Blocks().train(), torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    model.kept = captured
    quantized = quantize(model, {}, (x,))
    quantized.calibrate([(x,)])
    call, found = torch.compile(model.train(), backend="eager") if compiled else model.train(), []
    for model.kept in LATER:
        found.append(call(x).detach())
    assert not quantized.drift
    return found


@pytest.mark.parametrize("captured", [ALL, (True, False, True, True), pytest.param((False, False, False, True), marks=pytest.mark.slow)])
def test_equal_to_the_loop_run_eagerly(captured: tuple[bool, ...]) -> None:
    expected = outputs(ALL, compiled=False)
    assert all(torch.equal(output, other) for output, other in zip(outputs(captured, compiled=True), expected, strict=True))
