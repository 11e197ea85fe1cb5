"""A layer that nothing came to in the calibration runs in float in the file, and the report says that this is why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.errors import CCOWarning


class Experts(nn.Module):
    """Rows go to one of two experts by their first value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h, result = F.relu(self.first(x)), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where((x[:, 0] > 0) == bool(number))
            result = result.index_add(0, rows, expert(h[rows]))
        return self.last(result)


def test_an_expert_that_no_row_went_to(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    x[:, 0] = -1
    quantized = quantize(Experts().eval(), None, (x,))
    with pytest.warns(CCOWarning, match="nothing came out of"):
        quantized.calibrate([x])
    report = quantized.export(tmp_path / "a.onnx")
    reasons = {layer: island.reason for island in report.float_islands for layer in island.layers}
    assert any("has no range, since nothing came there" in reason for reason in reasons.values()), reasons
    assert not any(island.unplanned for island in report.float_islands)
