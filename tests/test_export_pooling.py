"""Average poolings whose last windows are smaller than the others, and a max pooling before concatenations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from export_case import calibrated
from torch import Tensor, nn

from lightning_cco import quantize


class Pooled(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.avg_pool2d(torch.relu(self.first(x)), **self.options))


def images() -> Tensor:
    return torch.randn(4, 3, 9, 9)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_windows_of_unequal_size_are_averaged_in_float(tmp_path: Path) -> None:
    quantized, _ = calibrated(Pooled(kernel_size=2, ceil_mode=True), images)
    assert quantized.plan.skipped["avg_pool"] == "avg_pool with these arguments is computed in float by ort"
    report = quantized.export(tmp_path / "model.onnx")
    assert report.float_nodes["AveragePool"] == 1
    assert not [island for island in report.float_islands if island.reason.startswith("planned in INT8")]
    assert report.sqnr_db > 35


@pytest.mark.parametrize("module", [False, True])
def test_windows_of_one_size_are_averaged_in_int8(module: bool) -> None:
    pool = nn.AvgPool2d(2) if module else None
    model = nn.Sequential(nn.Conv2d(3, 4, 3), pool, nn.Conv2d(4, 4, 3)) if pool is not None else Pooled(kernel_size=2)
    assert "avg_pool" in quantize(model, None, (images(),)).plan.quantized


def test_the_module_says_it_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(4, 4, 3))
    assert "avg_pool" in quantize(model, None, (images(),)).plan.skipped


class DenseBlock(nn.Module):
    """Layers that read all results before them; the first one puts one tensor together, as DenseNet of torchvision does."""

    def __init__(self, first: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = first
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(24, 4)
        self.convs = nn.ModuleList(nn.Conv2d(8 * count, 8, 3, padding=1) for count in (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        found = [x, F.relu(self.convs[0](self.first(x)))]
        found.append(F.relu(self.convs[1](torch.cat(found, 1))))
        return self.last(torch.cat(found, 1).mean((2, 3)))


ONE_ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "cat": lambda x: torch.cat([x], 1),
    "hstack": lambda x: torch.hstack([x]),
    "stack": lambda x: torch.stack([x]).flatten(0, 1),
    "cat with nothing": lambda x: torch.cat([x.new_empty(x.shape[0], 0, 4, 4), x], 1),
    "cat twice": lambda x: torch.cat([torch.cat([x])], 1),
}


@pytest.mark.parametrize("first", ONE_ALONE)
def test_one_tensor_alone_is_put_together_with_nothing(first: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    quantized = quantize(DenseBlock(ONE_ALONE[first]).eval(), None, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "a.onnx")
    assert report.integer_nodes["QLinearConv"] == 3
    assert report.integer_nodes["QLinearConcat"] == 2
    assert not {"Concat", "MaxPool"} & {*report.float_nodes}
