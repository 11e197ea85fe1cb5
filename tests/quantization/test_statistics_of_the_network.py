"""Networks that keep statistics of what passes (observers, moving averages): another branch for the first batch is no difference, unless a layer reads it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_cco import CCOWarning, quantize


class Kept(nn.Module):
    """Smallest and largest value, or the mean, of the batches so far; the first one begins."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(8))
        self.kind, self.batches = kind, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.keep(x)
            self.batches += 1
        return x / (1.0 + self.mean.abs()) if self.kind == "read by a layer" else x

    def keep(self, x: Tensor) -> None:
        low, mean = x.data.min(), x.detach().mean(0)
        if self.kind == "range":
            if self.low.abs().max() == 0:
                self.low = self.low + low
            else:
                self.low = self.low * 0.95 + low * 0.05
        elif self.kind == "in place":
            self.mean.copy_(mean) if self.batches == 0 else self.mean.mul_(0.9).add_(mean * 0.1)
        elif self.batches == 0:
            self.mean = self.mean + mean
        else:
            self.mean = 0.9 * self.mean + mean * 0.1


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.kept, self.second, self.last = nn.Linear(8, 8), Kept(kind), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.kept(self.first(x)).relu()).relu())


def drift_of(kind: str) -> list[str]:
    model, x = Net(kind).train(), torch.randn(4, 8)
    quantized = quantize(model, {}, (x,))
    quantized.calibrate([(x,)])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return quantized.drift


@pytest.mark.parametrize("kind", ["range", "mean", "in place"])
def test_what_is_only_kept_is_no_difference(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CCOWarning)
        assert not drift_of(kind)


def test_what_a_layer_reads_is_one() -> None:
    with pytest.warns(CCOWarning, match="'mul' was called.*in 'kept'"):
        assert drift_of("read by a layer")
