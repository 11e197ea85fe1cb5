"""What can't be in a file, or does not run in the engine, is refused with the layer's name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.errors import CCOError


class Ensemble(nn.Module):
    """Three linear layers as one function of their stacked weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weights, self.last = nn.Linear(8, 8), nn.Parameter(torch.randn(3, 8, 8) / 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(torch.vmap(lambda weight: F.linear(x, weight))(self.weights).mean(0))


class Projected(nn.Module):
    """An LSTM whose hidden state is projected, for which ONNX has no operator; the exporter writes one all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.LSTM(8, 12, proj_size=6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x)[0])


def _export(model: nn.Module, x: Tensor, path: Path) -> None:
    quantized = quantize(model.eval(), None, (x,))
    quantized.calibrate([x])
    quantized.export(path)


def test_weights_inside_a_vmap(tmp_path: Path) -> None:
    with pytest.raises(CCOError, match=r"'linear_1'.*torch\.vmap"):
        _export(Ensemble(), torch.randn(4, 8), tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_file_that_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(CCOError, match="does not run in ONNX Runtime at layer 'lstm'"):
        _export(Projected(), torch.randn(2, 5, 8), tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()
