"""Products whose first operand is the weight: token mixing, learned adjacencies, transposed layers; each exports and agrees with the fake-quantized model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize


class First(nn.Module):
    """A weight times what a layer gave."""

    def __init__(self, shape: tuple[int, int], product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.product, self.weight = product, nn.Parameter(torch.randn(*shape) * 0.4)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.product(self.weight, F.relu(self.first(x)))))


PRODUCTS: dict[str, tuple[tuple[int, int], tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "rows": ((8, 8), (16, 8), lambda w, x: (w @ x.t()).t()),
    "transposed": ((8, 8), (16, 8), lambda w, x: torch.mm(w.t(), x.t()).t()),
    "linalg": ((8, 8), (16, 8), lambda w, x: torch.linalg.matmul(w, x.mT).mT),
    "tokens": ((6, 6), (4, 6, 8), lambda w, x: w @ x),
    "einsum": ((6, 6), (4, 6, 8), lambda w, x: torch.einsum("ij,bjc->bic", w, x)),
}


class Fixed(nn.Module):
    """The same by a matrix that is not trained: a buffer, or made in the forward."""

    def __init__(self, made: bool) -> None:
        super().__init__()
        self.made = made
        self.register_buffer("matrix", torch.tril(torch.ones(6, 6)) / 6)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        matrix = torch.tril(torch.ones(6, 6)) / 6 if self.made else self.matrix
        return self.last(F.relu(matrix @ F.relu(self.first(x))))


@pytest.mark.parametrize("made", [True, False])
def test_a_matrix_that_is_not_trained(made: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    quantized = quantize(Fixed(made).eval(), {"global_quantization_settings": {"skip_tail_quantization": False}}, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "a.onnx", dynamic_batch=False)
    assert {"linear", "linear_1"} <= quantized.plan.quantized
    assert "matmul" not in quantized.plan.in_int8  # as the engine has no kernel for it
    assert all(not island.unplanned for island in report.float_islands)
    assert report.sqnr_db > 40


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_file_runs_and_agrees(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape, size, product = PRODUCTS[name]
    model, x = First(shape, product).eval(), torch.randn(*size)
    quantized = quantize(model, {"global_quantization_settings": {"skip_tail_quantization": False}}, (x,))
    quantized.calibrate([x])
    assert {"weight", "first.weight", "last.weight"} <= {
        parameter for layer in quantized.graph if layer.weighted for parameter in layer.parameters
    }
    assert quantized.export(tmp_path / "first.onnx").sqnr_db > 50.0
