"""Layers whose results no output depends on (CANINE's last encoder under a classifier) are not in the file: the report says so, and nothing is in doubt."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from lightning_cco import CCOWarning, quantize


class Unread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unread, self.also = (nn.Linear(8, 8) for _ in range(4))
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        self.also(self.unread(self.second(x)).relu())
        return self.last(x)


def test_they_are_named_and_no_difference(tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantized, x = quantize(Unread(), {}, (torch.randn(6, 8),)), torch.randn(6, 8)
    quantized.calibrate([(x,)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", CCOWarning)
        report = quantized.export(tmp_path / "model.onnx", (x,))
    assert not report.uncompared
    (note,) = [note for note in report.notes if "no output depends on" in note]
    assert "relu_1" in note
    assert "'relu'" not in note
    stored = [entry for entry in onnx.load(tmp_path / "model.onnx").graph.initializer if len(entry.dims) == 2]
    assert [tuple(entry.dims) for entry in stored if entry.data_type == onnx.TensorProto.INT8] == [(8, 8)]
