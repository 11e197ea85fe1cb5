"""Embeddings written by hand: rows of a parameter, or of a buffer, selected by integers that depend on the inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import lightning_cco as cc

WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda table, rows: table[rows],
    "index with a slice": lambda table, rows: table[rows, :],
    "index_select": lambda table, rows: table.index_select(0, rows.flatten()).view(*rows.shape, -1),
    "gather": lambda table, rows: table.gather(0, rows.reshape(-1, 1).expand(-1, table.shape[1])).view(*rows.shape, -1),
    "take_along_dim": lambda table, rows: torch.take_along_dim(table, rows.reshape(-1, 1), 0).view(*rows.shape, -1),
    "narrowed before": lambda table, rows: table[2:, :][rows],
    "scaled before": lambda table, rows: (table * 2.0)[rows],
}


class Table(nn.Module):
    """Rows of a table, then linear layers."""

    def __init__(self, way: str, parameter: bool = True) -> None:
        super().__init__()
        self.way, table = way, torch.randn(30, 16)
        if parameter:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)
        self.inner, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(WAYS[self.way](self.table, rows))))


@pytest.fixture
def rows() -> Tensor:
    return torch.randint(0, 28, (8, 6))


@pytest.mark.parametrize("parameter", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_what_an_int8_layer_reads_is_rounded(rows: Tensor, way: str, parameter: bool) -> None:
    model = Table(way, parameter)
    quantized = cc.quantize(model, None, (rows,))
    quantized.calibrate([rows])
    read = WAYS[way](model.table, rows).detach()
    seen: list[Tensor] = []
    model.inner.register_forward_hook(lambda _, __, result: seen.append(result.detach()))
    (key,) = (key for key in quantized.activations if quantized.plan.origins.get(key, key).layer == "lookup")
    with torch.no_grad():
        model(rows)
        grid = quantized.activations[key]
        rounded = torch.fake_quantize_per_tensor_affine(read, float(grid.scale), int(grid.zero_point), 0, 255)
        weight = model.inner.weight.detach()
        scale = quantized.weights["linear"][0].scale(weight).reshape(-1)
        weight = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(16, dtype=torch.int32), 0, -127, 127)
        expected = nn.functional.linear(rounded, weight, model.inner.bias)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("way", WAYS)
def test_it_counts_as_a_layer_with_weights_and_says_what_to_write(rows: Tensor, way: str) -> None:
    quantized = cc.quantize(Table(way), None, (rows,))
    layer = quantized.graph["lookup"]
    assert layer.weighted == (way != "scaled before") or layer.parameters == ("table",)
    assert "torch.nn.functional.embedding" in quantized.plan.skipped["lookup"]


@pytest.mark.parametrize("way", ["index", "gather"])
def test_the_file_agrees(rows: Tensor, way: str, tmp_path: Path) -> None:
    model = Table(way).eval()
    quantized = cc.quantize(model, None, (rows,))
    quantized.calibrate([rows])
    report = quantized.export(tmp_path / "model.onnx", (rows,))
    assert report.integer_nodes == {"MatMulIntegerToFloat": 1}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: rows.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), model(rows), rtol=1e-4, atol=1e-4)
