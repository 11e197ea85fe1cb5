"""Sparse tensors pass as they are: they hold no zeros to round, and no engine multiplies them in INT8; the layers around them are quantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning_modules import make_trainer, quick
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cco import quantize

ADJACENCY = torch.eye(6).roll(1, 0)
FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "coo": lambda m, x: ADJACENCY.to_sparse() @ x,
    "csr": lambda m, x: ADJACENCY.to_sparse_csr() @ x,
    "sparse.mm": lambda m, x: torch.sparse.mm(ADJACENCY.to_sparse_csr(), x),
    "made of an activation": lambda m, x: x.to_sparse_csr() @ m.weight,
    "and back": lambda m, x: x.to_sparse().to_dense() @ m.weight,
}


class Graph(nn.Module):
    def __init__(self, form: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.weight, self.form = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8) / 3), form

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.form(self, F.relu(self.first(x)))))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("form", FORMS)
def test_layers_around_sparse_tensors(form: str) -> None:
    model, x = Graph(FORMS[form]).eval(), torch.randn(6, 8)
    expected = model(x)
    quantized = quantize(model, {"global_quantization_settings": {"skip_tail_quantization": False}}, (x,))
    quantized.calibrate([x])
    assert {"linear", "linear_1"} <= quantized.plan.quantized
    assert 0 < (model(x) - expected).abs().max() < 0.1 * expected.abs().max()


class Kept(nn.Module):
    """The matrix of a graph is a buffer, or an attribute."""

    def __init__(self, layout: torch.layout, buffer: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        matrix = ADJACENCY.to_sparse(layout=layout)
        if buffer:
            self.register_buffer("matrix", matrix)
        else:
            self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(torch.sparse.mm(self.matrix, self.second(F.relu(self.matrix @ self.first(x))))))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("buffer", [True, False])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_matrix_that_a_module_holds(layout: torch.layout, buffer: bool) -> None:
    model, x = Kept(layout, buffer), torch.randn(6, 8)
    expected = model(x)
    quantized = quantize(model, None, (x,))
    assert torch.equal(model(x), expected)
    quantized.calibrate([x])
    assert {"linear", "linear_1"} <= quantized.plan.quantized
    assert quantized.graph["matmul"].note == "no INT8 kernel takes sparse tensors"
    assert 0 < (model(x) - expected).abs().max() < 0.1 * expected.abs().max()
    model(x).sum().backward()
    assert model.first.weight.grad is not None


class Batches(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, matrix = batch
        return self.last(F.relu(torch.sparse.mm(matrix, self.second(F.relu(self.first(x)))))).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_batches_that_hold_sparse_tensors(tmp_path: Path) -> None:
    data = DataLoader([(torch.randn(6, 8), ADJACENCY.to_sparse()) for _ in range(3)], batch_size=None)
    cco = quick()
    make_trainer(tmp_path, cco, max_epochs=1).fit(Batches(), data)
    assert cco.quantized is not None
    assert {"linear", "linear_1"} <= cco.quantized.plan.quantized
