"""Layers whose arguments decide what the file must hold: shared ones, bounded tables, groups; and files of fixed sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_case import calibrated
from torch import Tensor, nn

from lightning_cco.export.ort_session import engine_session

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own warnings


class Loop(nn.Module):
    """Cells and a layer that every step calls."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out, self.head = nn.GRUCell(8, 32), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 32)
        for step in x.unbind(1):
            h = torch.relu(self.out(self.cell(step, h)))
        return self.head(h)


def test_the_constants_of_a_layer_that_is_called_many_times_are_stored_once(tmp_path: Path) -> None:
    quantized, x = calibrated(Loop(), lambda: torch.randn(4, 5, 8))
    report = quantized.export(tmp_path / "model.onnx", (x,), dynamic_batch=False)
    assert report.sqnr_db > 20
    stored = [onnx.numpy_helper.to_array(entry) for entry in onnx.load(tmp_path / "model.onnx").graph.initializer]
    shapes = [array.shape for array in stored if array.ndim == 2]
    assert sorted(shapes) == sorted([(96, 8), (96, 32), (32, 32), (3, 32)])
    assert sum(array.nbytes for array in stored) < 2 * sum(p.numel() for p in quantized.model.parameters())


class Lookup(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.body, self.head = table, nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(self.table(ids))))


@pytest.mark.parametrize("skipped", [False, True], ids=["int8", "float"])
@pytest.mark.parametrize(
    "make", [lambda: nn.Embedding(60, 16, max_norm=1.0), lambda: nn.EmbeddingBag(60, 16, max_norm=2.0, norm_type=1.0, mode="sum")],
    ids=["embedding", "bag"],
)  # fmt: skip
def test_rows_that_no_batch_has_looked_up_are_within_max_norm_too(make: Any, skipped: bool, tmp_path: Path) -> None:
    ids = torch.arange(30).reshape(15, 2)
    kind = "embedding_bag" if isinstance(make(), nn.EmbeddingBag) else "embedding"
    settings = {"layer_settings": [{"match": kind, "skip_quantization": True}]} if skipped else None
    quantized, _ = calibrated(Lookup(make()), lambda: ids, settings)
    quantized.export(tmp_path / "model.onnx", (ids,), check=False)
    got = engine_session(str(tmp_path / "model.onnx")).run(None, {"ids": (ids + 30).numpy()})[0]
    with torch.no_grad():
        expected = quantized.model(ids + 30)
    np.testing.assert_allclose(got, expected.numpy(), atol=0.02 * float(expected.abs().max()))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.both, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Bilinear(8, 8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.both(torch.relu(self.a(x)), torch.relu(self.b(x)))))


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=4), nn.ReLU(), nn.Conv2d(8, 4, 3))


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(3, 2, 1, divisor_override=4), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )


@pytest.mark.parametrize(
    ("make", "shape", "target"),
    [(grouped, (2, 3, 12, 12), "ort"), (grouped, (2, 3, 12, 12), "openvino"), (Pair, (4, 5, 8), "ort"), (pooled, (2, 3, 12, 12), "ort")],
    ids=["grouped transposed", "grouped transposed, openvino", "bilinear", "divisor"],
)
def test_layers_whose_weights_have_another_form_are_exported(make: Any, shape: tuple[int, ...], target: str, tmp_path: Path) -> None:
    settings = {"deployment_settings": {"target_framework": target}}
    quantized, _ = calibrated(make(), lambda: torch.randn(shape), settings)
    assert quantized.export(tmp_path / "model.onnx").sqnr_db > 20


def test_fixed_sizes_cost_no_integer_products(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    quantized, _ = calibrated(nn.Sequential(nn.Linear(16, 16), layer, nn.Linear(16, 4)), lambda: torch.randn(4, 6, 16))
    varying, fixed = (quantized.export(tmp_path / "model.onnx", dynamic_batch=dynamic).integer_nodes for dynamic in (True, False))
    products = sum(varying.values())
    assert products > 3
    assert sum(fixed.values()) >= products


class Inverted(nn.Module):
    """A layer whose weight is an inverse, for which ONNX has no operator: it is a constant, made of a parameter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.matrix, self.last = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8) + 4 * torch.eye(8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(nn.functional.linear(torch.relu(self.first(x)), torch.linalg.inv(self.matrix))))


def test_a_weight_that_is_an_inverse_is_stored(tmp_path: Path) -> None:
    quantized, x = calibrated(Inverted(), lambda: torch.randn(4, 8))
    report = quantized.export(tmp_path / "model.onnx", (x,))
    assert sum(report.integer_nodes.values()) >= 2
    stored = [onnx.numpy_helper.to_array(entry) for entry in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert sum(array.nbytes for array in stored if array.shape == (8, 8)) == 2 * 64  # as integers alone
