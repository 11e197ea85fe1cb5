"""Layers of equal weights, which `nn.TransformerEncoder` starts with, and one layer called twice: their weights are stored once, each part is used by both."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_cco import quantize


def test_a_file_of_layers_with_equal_weights_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 4)).eval()
    x = torch.randn(3, 5, 16)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "model.onnx", dynamic_batch=False)
    assert report.sqnr_db > 40
    assert not [island for island in report.float_islands if island.unplanned]
