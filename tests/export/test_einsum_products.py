"""An einsum is planned in INT8 where ONNX Runtime computes it in INT8: products with a matrix; others have integer weights alone, and the report names them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.graph.einsum_equations import einsum_by_matmul, matrix_product

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
MATRIX: Shapes = {
    "bi,oi->bo": ((8,), (8, 8)),
    "bi,io->bo": ((8,), (8, 8)),
    "bti,oi->bto": ((5, 8), (8, 8)),
    "...i,io->...o": ((5, 8), (8, 8)),
    "bit,oi->bto": ((8, 5), (8, 8)),
    "bti,io->bot": ((5, 8), (8, 8)),
}
SHAPED: Shapes = {  # heads and their features, as XLNet and Funnel have them
    "bti,hid->bthd": ((5, 8), (2, 8, 4)),
    "bti,ihd->bhtd": ((5, 8), (8, 2, 4)),
    "bthd,ohd->bto": ((5, 2, 4), (6, 2, 4)),
    "bhtd,hdo->bto": ((2, 5, 4), (2, 4, 6)),
    "bdth,ohd->bto": ((4, 5, 2), (6, 2, 4)),
    "...hd,hdef->...ef": ((5, 2, 4), (2, 4, 3, 2)),
}
OTHERS: Shapes = {
    "bti,tio->bto": ((5, 8), (5, 8, 8)),
    "bi,i->bi": ((8,), (8,)),
    "bti,i->bt": ((5, 8), (8,)),
}
FAST = ("bi,oi->bo", "bit,oi->bto", "bti,tio->bto", "bti,hid->bthd", "bdth,ohd->bto")


class Einsum(nn.Module):
    def __init__(self, equation: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> None:
        super().__init__()
        self.equation, self.weight = equation, nn.Parameter(torch.randn(weight) / 3)
        self.first = nn.Linear(shape[-1], shape[-1])
        x = torch.zeros(2, *shape)
        self.last = nn.Linear(torch.einsum(equation, x, self.weight).flatten(1).shape[1], 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(torch.einsum(self.equation, F.relu(self.first(x)), self.weight)).flatten(1))


def _exported(model: Einsum, x: Tensor, path: Path, bits: int = 8) -> tuple[bool, dict[str, int], dict[str, int], list[str]]:
    settings = {"global_quantization_settings": {"weights_num_bits": bits}} if bits != 8 else None
    quantized = quantize(model.eval(), settings, (x,))
    quantized.calibrate([x])
    report = quantized.export(path)
    islands = [layer for island in report.float_islands for layer in island.layers]
    return "einsum" in quantized.plan.quantized, report.integer_nodes, report.float_nodes, islands


@pytest.mark.parametrize("equation", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MATRIX])
def test_a_product_with_a_matrix_runs_in_int8(equation: str, tmp_path: Path) -> None:
    shape, weight = MATRIX[equation]
    planned, integer, in_float, _ = _exported(Einsum(equation, shape, weight), torch.randn(4, *shape), tmp_path / "a.onnx")
    assert planned
    assert integer["QLinearMatMul"] == 1
    assert "Einsum" not in in_float


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("equation", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in SHAPED])
def test_a_product_with_a_weight_of_more_dimensions_runs_in_int8(equation: str, bits: int, tmp_path: Path) -> None:
    shape, weight = SHAPED[equation]
    model, x = Einsum(equation, shape, weight), torch.randn(4, *shape)
    planned, integer, in_float, islands = _exported(model, x, tmp_path / "a.onnx", bits)
    assert planned
    assert sum(count for operator, count in integer.items() if "MatMul" in operator) == 2  # the linear layer before it is the other one
    assert not {"Einsum", "MatMul"} & {*in_float}
    assert "einsum" not in islands


@pytest.mark.parametrize("equation", [*MATRIX, *SHAPED])
def test_outputs_have_scales_of_their_own(equation: str) -> None:
    shape, of_weight = {**MATRIX, **SHAPED}[equation]
    model, x = Einsum(equation, shape, of_weight).eval(), torch.randn(4, *shape)
    quantized = quantize(model, None, (x,))
    (quantizer,) = quantized.weights["einsum"]
    second = equation.partition("->")[0].split(",")[1]
    outputs = [axis for axis, label in enumerate(second) if label in equation.partition("->")[2]]
    axis = max(outputs, key=lambda axis: of_weight[axis])
    weight = model.weight.detach()
    scale = weight.abs().amax([other for other in range(weight.dim()) if other != axis]) / 127
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    torch.testing.assert_close(quantizer(weight), torch.fake_quantize_per_channel_affine(weight, scale, zeros, axis, -127, 127))


@pytest.mark.parametrize("equation", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS])
def test_other_equations_are_named_as_float(equation: str, tmp_path: Path) -> None:
    shape, weight = OTHERS[equation]
    planned, _, in_float, islands = _exported(Einsum(equation, shape, weight), torch.randn(4, *shape), tmp_path / "a.onnx")
    assert not planned
    assert in_float["Einsum"] == 1
    assert "einsum" in islands


@pytest.mark.parametrize(
    "equation", [*MATRIX, *SHAPED, *OTHERS, "ab,bc->ca", "abc,bd->dac", "...a,ba->...b", "a...,ba->b...", "aa,ab->ab", "ab,bc"]
)
def test_a_product_gives_what_einsum_gives(equation: str) -> None:
    sizes = dict(zip("abcdefioth", (3, 3, 5, 6, 2, 4, 8, 8, 5, 2), strict=True))
    first, second = equation.partition("->")[0].split(",")
    x, w = (torch.randn([4 if part == "." else sizes[part] for part in term.replace("...", ".")]).double() for term in (first, second))
    torch.testing.assert_close(einsum_by_matmul(equation, x, w), torch.einsum(equation, x, w))


def test_what_is_no_product_with_a_matrix() -> None:
    assert matrix_product("bti,tio->bto", 3, 3) is None
    assert matrix_product("bi,bi->b", 2, 2) is None
    assert matrix_product([0, 1], 2, 2) is None
