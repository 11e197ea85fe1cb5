"""A batch norm that is called as a function is folded by what it is called with, whatever its module holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


class OneMore(nn.BatchNorm2d):
    """Its weight is one less than the factor, and its eps another one."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight + 1, self.bias, self.training, 0.1, 1e-2)


class Frozen(nn.Module):
    """A norm of buffers, as detection networks have them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in zip("wbmv", (torch.rand(channels) + 0.5, *torch.randn(2, channels), torch.rand(channels) + 0.5), strict=True):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.m, self.v, self.w, self.b, False)


class OfTheBatch(nn.BatchNorm2d):
    """Normalizes by the batch in evaluation as well."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.0, self.eps)


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


def settled(kind: type[nn.Module], x: Tensor) -> nn.Module:
    model = Normed(kind(8)).train()
    with torch.no_grad():
        for _ in range(30):
            model(x)
    return model.eval()


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kind", [OneMore, Frozen])
def test_it_is_folded_by_the_call(kind: type[nn.Module], graph: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    model = settled(kind, x)
    model = torch.fx.symbolic_trace(model) if graph else model
    quantized = quantize(model, {"global_quantization_settings": {"skip_tail_quantization": False}}, (x,))
    quantized.calibrate([x])
    assert quantized.plan.groups["conv"] == "batch_norm"
    report = quantized.export(tmp_path / "a.onnx", dynamic_batch=False)
    assert report.sqnr_db > 50
    assert report.integer_nodes["QLinearConv"] == 2


def test_one_that_normalizes_by_the_batch_stays_apart() -> None:
    x = torch.randn(8, 3, 8, 8)
    quantized = quantize(settled(OfTheBatch, x), None, (x,))
    assert "batch_norm" not in quantized.plan.groups.values()
    assert "batch_norm" in quantized.plan.skipped
