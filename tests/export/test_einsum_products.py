"""An einsum is planned in INT8 where ONNX Runtime computes it in INT8: products with a matrix; others have integer weights alone, and the report names them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.graph.einsum_equations import einsum_by_matmul, matrix_product

MATRIX = {
    "bi,oi->bo": (8,),
    "bi,io->bo": (8,),
    "bti,oi->bto": (5, 8),
    "...i,io->...o": (5, 8),
    "bit,oi->bto": (8, 5),
    "bti,io->bot": (5, 8),
}
OTHERS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "bti,hid->bthd": ((5, 8), (2, 8, 4)),
    "bti,tio->bto": ((5, 8), (5, 8, 8)),
    "bi,i->bi": ((8,), (8,)),
}
FAST = ("bi,oi->bo", "bit,oi->bto", "bti,hid->bthd")


class Einsum(nn.Module):
    def __init__(self, equation: str, shape: tuple[int, ...], weight: tuple[int, ...] = (8, 8)) -> None:
        super().__init__()
        self.equation, self.weight = equation, nn.Parameter(torch.randn(weight) / 3)
        self.first = nn.Linear(shape[-1], shape[-1])
        x = torch.zeros(2, *shape)
        self.last = nn.Linear(torch.einsum(equation, x, self.weight).flatten(1).shape[1], 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(torch.einsum(self.equation, F.relu(self.first(x)), self.weight)).flatten(1))


def _exported(model: Einsum, x: Tensor, path: Path) -> tuple[bool, dict[str, int], dict[str, int], list[str]]:
    quantized = quantize(model.eval(), None, (x,))
    quantized.calibrate([x])
    report = quantized.export(path)
    islands = [layer for island in report.float_islands for layer in island.layers]
    return "einsum" in quantized.plan.quantized, report.integer_nodes, report.float_nodes, islands


@pytest.mark.parametrize("equation", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MATRIX])
def test_a_product_with_a_matrix_runs_in_int8(equation: str, tmp_path: Path) -> None:
    x = torch.randn(4, *MATRIX[equation])
    planned, integer, in_float, _ = _exported(Einsum(equation, MATRIX[equation]), x, tmp_path / "a.onnx")
    assert planned
    assert integer["QLinearMatMul"] == 1
    assert "Einsum" not in in_float


@pytest.mark.parametrize("equation", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS])
def test_other_equations_are_named_as_float(equation: str, tmp_path: Path) -> None:
    shape, weight = OTHERS[equation]
    planned, _, in_float, islands = _exported(Einsum(equation, shape, weight), torch.randn(4, *shape), tmp_path / "a.onnx")
    assert not planned
    assert in_float["Einsum"] == 1
    assert "einsum" in islands


@pytest.mark.parametrize("equation", [*MATRIX, *OTHERS, "ab,bc->ca", "abc,bd->dac", "...a,ba->...b", "a...,ba->b...", "aa,ab->ab", "ab,bc"])
def test_a_product_gives_what_einsum_gives(equation: str) -> None:
    sizes = dict(zip("abcdiotht", (3, 3, 5, 6, 8, 8, 5, 2, 5), strict=True))
    first, second = equation.partition("->")[0].split(",")
    x, w = (torch.randn([4 if part == "." else sizes[part] for part in term.replace("...", ".")]).double() for term in (first, second))
    torch.testing.assert_close(einsum_by_matmul(equation, x, w), torch.einsum(equation, x, w))


def test_what_is_no_product_with_a_matrix() -> None:
    assert matrix_product("bti,tio->bto", 3, 3) is None
    assert matrix_product("bi,bi->b", 2, 2) is None
    assert matrix_product([0, 1], 2, 2) is None
