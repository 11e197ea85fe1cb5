"""A ReLU whose result is needed as it is runs on floats, and the linear layer before it in integers all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_files import File, optimized
from torch import Tensor, nn

from lightning_cco import quantize

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


@pytest.mark.parametrize("relu", ["Max", "Relu"])
def test_ort_relu_as_maximum(relu: str, tmp_path: Path) -> None:
    file = File()
    x = file.rounded("x")
    levels, scale = file.constant(np.arange(8, dtype=np.int32)), file.constant(np.full(8, 0.02 * 0.01, np.float32))
    bias = file.node("DequantizeLinear", levels, scale, axis=0)
    product = file.node("Gemm", x, file.weight(8, 16), bias, transB=1)
    output = file.node("Max", product, file.constant(np.float32(0))) if relu == "Max" else file.node("Relu", product)
    found = optimized(file.save(tmp_path / "a.onnx", (2, 16), file.node("Softmax", output)))
    assert bool(found["QGemm"]) is (relu == "Max"), found


class Needed(nn.Module):
    """A ReLU of which something needs the values as they are."""

    def __init__(self, need: Callable[[Tensor], Tensor], inplace: bool) -> None:
        super().__init__()
        self.need, self.inplace = need, inplace
        self.first, self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x), inplace=self.inplace)
        return self.last(F.relu(self.second(x * self.need(x))))


NEEDS = {
    "its order": lambda x: x.argsort(1)[:, :1].float(),
    "which are above": lambda x: (x > 0.3).float().mean(1, keepdim=True),
}


@pytest.mark.parametrize(("need", "inplace"), [("its order", False), ("its order", True), ("which are above", False)])
def test_a_relu_needed_as_it_is(need: str, inplace: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 16)
    quantized = quantize(Needed(NEEDS[need], inplace).eval(), None, (x,))
    quantized.calibrate([x])
    assert "needed as it is" in quantized.plan.skipped["relu"]
    assert {"linear", "linear_1"} <= quantized.plan.quantized
    report = quantized.export(tmp_path / "a.onnx")
    assert report.integer_nodes["QGemm"] == 2


def test_a_relu_of_a_residual_stream_in_float(tmp_path: Path) -> None:
    class Residual(nn.Module):
        """Two blocks of one linear layer."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            x = x + F.relu(self.b(x))
            return self.last(F.relu(self.c(x)))

    torch.manual_seed(0)
    x = torch.randn(32, 16)
    quantized = quantize(Residual().eval(), {"global_quantization_settings": {"residual_stream": "float"}}, (x,))
    quantized.calibrate([x])
    assert {name: str(why) for name, why in quantized.plan.skipped.items() if "residual_stream" in str(why)}.keys() >= {"relu", "relu_1"}
    assert quantized.export(tmp_path / "a.onnx").integer_nodes["QGemm"] == 3


def test_a_relu_that_is_kept_beside_and_that_no_int8_layer_reads(tmp_path: Path) -> None:
    class Kept(nn.Module):
        """Keeps which values are above a limit, for a log; the layers after the ReLU are in float."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
            self.register_buffer("above", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            self.above = (x > 0.3).sum()
            return self.last(torch.softmax(x, 1))

    torch.manual_seed(0)
    x = torch.randn(32, 16)
    quantized = quantize(Kept().eval(), None, (x,))
    quantized.calibrate([x])
    assert "needed as it is" in quantized.plan.skipped["relu"]
    assert quantized.export(tmp_path / "a.onnx").integer_nodes["QGemm"] == 1
