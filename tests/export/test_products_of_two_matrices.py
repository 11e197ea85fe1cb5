"""Products of matrices with a weight, and what is added to them: they run in INT8 in ONNX Runtime whether their result is rounded or goes on in float."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import CCOWarning, quantize
from lightning_cco.export import engine_spellings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

Product = Callable[[Any, Tensor], Tensor]
PRODUCTS: dict[str, Product] = {
    "mm": lambda s, x: torch.mm(x, s.weight) + s.bias,
    "matmul": lambda s, x: x @ s.weight + s.bias,
    "linear, added after it": lambda s, x: F.linear(x, s.weight) + s.bias,
    "einsum": lambda s, x: torch.einsum("bi,io->bo", x, s.weight) + s.bias,
    "addmm": lambda s, x: torch.addmm(s.bias, x, s.weight),
    "addmm by keywords": lambda s, x: torch.addmm(input=s.bias, mat1=x, mat2=s.weight),
    "addmm, transposed": lambda s, x: s.bias.addmm(x, s.weight.t()),
    "addmm, a bias of two dimensions": lambda s, x: torch.addmm(s.bias[None], x, s.weight),
    "addmm with a factor": lambda s, x: torch.addmm(s.bias, x, s.weight, alpha=0.5),
    "Conv1D of Hugging Face": lambda s, x: torch.addmm(s.bias, x.view(-1, 8), s.weight).view(x.shape),
}


class Branches(nn.Module):
    """Each product twice: a norm reads it in float, and a linear layer through a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.parts = nn.ModuleList(Part(product) for product in [*PRODUCTS.values()] * 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.first(x))
        half = len(PRODUCTS)
        return [self.norm(part(x)) for part in self.parts[:half]] + [F.relu(part(x)) for part in self.parts[half:]]


class Part(nn.Module):
    def __init__(self, product: Product) -> None:
        super().__init__()
        self.weight, self.bias, self.product = nn.Parameter(0.3 * torch.randn(8, 8)), nn.Parameter(torch.randn(8)), product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self, x)


def test_every_product_runs_in_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    model = Branches().eval()
    quantized = quantize(model, {"global_quantization_settings": {"skip_tail_quantization": False}}, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "a.onnx")
    integer = {kind: count for kind, count in report.integer_nodes.items() if kind in ("QGemm", "MatMulIntegerToFloat", "QLinearMatMul")}
    assert sum(integer.values()) == 2 * len(PRODUCTS) + 1
    assert not {"Gemm", "MatMul", "FusedMatMul"} & set(report.float_nodes)
    assert not [island for island in report.float_islands if island.unplanned]
    with torch.no_grad():
        expected = model(x)
    for found, reference in zip(onnxruntime.InferenceSession(tmp_path / "a.onnx").run(None, {"x": x.numpy()}), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), reference, atol=1e-2, rtol=0)


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.part, self.norm, self.last = nn.Linear(8, 8), Part(PRODUCTS["mm"]), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.part(F.relu(self.first(x)))))


@pytest.mark.computed_in_float
def test_a_product_that_the_engine_hides_behind_an_addition_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_spellings, "_stands_apart", lambda site, plan: False)
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    quantized = quantize(Added().eval(), None, (x,))
    quantized.calibrate([x])
    with pytest.warns(CCOWarning, match="planned in INT8, but ONNX Runtime computes in float: 'matmul'"):
        report = quantized.export(tmp_path / "a.onnx")
    assert [island.layers for island in report.float_islands if island.unplanned] == [("matmul",)]
