"""Average poolings whose last windows are smaller than the others."""

from __future__ import annotations

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
