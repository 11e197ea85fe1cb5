"""Recurrent layers that are given time first: the batch, their second axis, varies in the file; the length is fixed, which is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from export_case import run
from torch import Tensor, nn

from lightning_cco import quantize


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_the_batch_of_a_layer_that_reads_time_first_varies(tmp_path: Path) -> None:
    x = torch.randn(7, 4, 6)
    quantized = quantize(TimeFirst().eval(), None, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "model.onnx", example_args=(x,))
    assert any("axis 0 of 'x' is 7" in note for note in report.notes)
    other = torch.randn(7, 9, 6)
    with torch.no_grad():
        np.testing.assert_allclose(run(tmp_path / "model.onnx", other), quantized.model(other).numpy(), atol=1e-4)
