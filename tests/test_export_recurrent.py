"""Recurrent layers in files: batch and length vary, also where time comes first; each is one operator, whatever the length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_case import run
from torch import Tensor, nn

from lightning_cco import quantize

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(6, 8, **options)
        self.head = nn.Linear(16 if options.get("bidirectional") else 8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        result, state = self.rnn(x)
        return self.head(result), state[0] if isinstance(state, tuple) else state


def exported(model: nn.Module, x: Tensor, path: Path, **options: Any) -> tuple[Any, Any]:
    quantized = quantize(model.eval(), None, (x,))
    quantized.calibrate([x])
    return quantized, quantized.export(path, example_args=(x,), **options)


@pytest.mark.parametrize(
    ("kind", "options", "axes"),
    [
        ("LSTM", {}, ["sequence", "batch", 6]),
        ("GRU", {"bidirectional": True, "num_layers": 2}, ["sequence", "batch", 6]),
        ("GRU", {"batch_first": True, "bias": False}, ["batch", "sequence", 6]),
        ("RNN", {"bias": False, "num_layers": 2}, ["sequence", "batch", 6]),
        ("RNN", {"batch_first": True, "bidirectional": True, "nonlinearity": "relu"}, ["batch", "sequence", 6]),
    ],
)
def test_batch_and_length_vary(kind: str, options: dict[str, Any], axes: list[Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantized, report = exported(Recurrent(kind, **options), torch.randn(7, 4, 6), tmp_path / "model.onnx")
    assert report.inputs == {"x": axes}
    for shape in ((7, 4, 6), (11, 9, 6), (1, 2, 6), (2, 1, 6)):
        other = torch.randn(*shape)
        with torch.no_grad():
            np.testing.assert_allclose(run(tmp_path / "model.onnx", other), quantized.model(other)[0].numpy(), atol=1e-4)
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert operators.count(kind) == options.get("num_layers", 1)


def test_the_batch_varies_alone_where_sizes_are_fixed(tmp_path: Path) -> None:
    quantized, report = exported(Recurrent("LSTM"), torch.randn(7, 4, 6), tmp_path / "model.onnx", dynamic_sizes=False)
    assert report.inputs == {"x": [7, "batch", 6]}
    other = torch.randn(7, 9, 6)
    with torch.no_grad():
        np.testing.assert_allclose(run(tmp_path / "model.onnx", other), quantized.model(other)[0].numpy(), atol=1e-4)
