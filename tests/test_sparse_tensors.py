"""Sparse tensors pass as they are: they hold no zeros to round, and no engine multiplies them in INT8; the layers around them are quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
