"""What the plan says of OpenVINO is what its graph does: products of weights on the right in INT8, the rest as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export_models import settled
from torch import Tensor, nn

from lightning_cco import quantize

SETTINGS = {
    "global_quantization_settings": {"skip_tail_quantization": False},
    "deployment_settings": {"target_framework": "openvino", "vnni": False},
}


class Images(nn.Module):
    """Activations and a transposed convolution between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 1) for _ in range(4))])
        self.act, self.grow = nn.PReLU(8), nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth, last = self.convs
        x = second(self.act(first(x)))
        x = third(F.silu(x))
        return last(self.grow(fourth(F.hardswish(x))))


class Products(nn.Module):
    """Products of two activations, and with a weight on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.right, self.left = nn.Parameter(0.4 * torch.randn(8, 8)), nn.Parameter(0.4 * torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)) @ torch.relu(self.b(x))
        return self.last(self.left @ torch.relu(x @ self.right))


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize(
    ("make", "shape", "layer_type", "in_int8", "in_float", "weight_only"),
    [
        pytest.param(Images, (2, 3, 8, 8), "Convolution", 5, {"prelu", "hardswish"}, {"conv_transpose"}, id="images"),
        pytest.param(Products, (2, 8, 8), "FullyConnected", 4, {"matmul", "matmul_2"}, set(), id="products"),
    ],
)
def test_openvino_computes_in_int8_what_is_planned_so(
    make: type[nn.Module],
    shape: tuple[int, ...],
    layer_type: str,
    in_int8: int,
    in_float: set[str],
    weight_only: set[str],
    tmp_path: Path,
) -> None:
    openvino = pytest.importorskip("openvino")
    x = torch.randn(*shape)
    quantized = quantize(settled(make()), SETTINGS, (x,))
    quantized.calibrate([x])
    plan = quantized.plan
    assert plan.weight_only == weight_only
    assert in_float <= plan.skipped.keys() - weight_only
    quantized.export(tmp_path / "model.onnx")
    compiled = openvino.Core().compile_model(str(tmp_path / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    information = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    kinds = [entry["runtimePrecision"].astype(str) for entry in information if entry["layerType"].astype(str) == layer_type]
    assert kinds.count("u8") == in_int8
    with torch.no_grad():
        expected = quantized.model(x).numpy()
    assert np.square(compiled(x.numpy())[0] - expected).sum() < 1e-3 * np.square(expected).sum()


def test_a_convolution_hands_its_result_over_in_float_for_openvino() -> None:
    """An activation that is no clamp goes into the convolution before it, so one rounding is enough."""
    quantized = quantize(settled(Images()), SETTINGS, (torch.randn(2, 3, 8, 8),))
    assert {"prelu", "silu", "hardswish"} <= quantized.plan.tensors.keys()
    assert "conv" not in quantized.plan.tensors
