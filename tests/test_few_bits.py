"""Formats of fewer than 8 bits, and clamps that do not start at 0, are computed in INT8: the engine's integers are narrowed, not its floats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from export_case import MODELS, calibrated, run
from torch import Tensor, nn


class Clamped(nn.Module):
    """Clamps of every form after convolutions, a sum, a concat, a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(count, 8, 3, padding=1) for count in (3, 8, 8, 8, 8))
        self.fc, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth, fifth = self.layers
        x = F.relu6(first(x))
        x = x + F.relu(second(x))
        x = third(x).clamp(min=0.1)
        y = F.hardtanh(fourth(x), -0.2, 0.3)
        x = torch.cat([y, fifth(y).clip_(-1.0)], 1).mean((2, 3))
        return self.head(torch.relu(self.fc(x)))


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_clamps_and_few_bits_cost_no_integer_operator(bits: int, tmp_path: Path) -> None:
    general = {
        "weights_num_bits": max(bits, 4),
        "activations_num_bits": bits,
        "residual_stream": "quantized",
    }  # else a sum is rounded twice
    quantized, x = calibrated(Clamped(), images, {"global_quantization_settings": general})
    report = quantized.export(tmp_path / "model.onnx")
    assert report.integer_nodes == {"QLinearConv": 5, "QLinearAdd": 1, "QLinearConcat": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1}
    assert report.float_nodes == {"Gemm": 1}
    assert report.largest_steps <= 1
    with quantized.evaluating():
        expected = quantized.model(x).numpy()
    step = float(quantized.activations["relu_1"].scale)
    assert abs(run(tmp_path / "model.onnx", x, optimize=False) - expected).max() < 8 * step


@pytest.mark.filterwarnings("ignore")
def test_openvino_computes_convolutions_of_four_bits_in_integers(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    make, example, _ = MODELS["residual"]
    settings = {
        "global_quantization_settings": {"weights_num_bits": 4, "activations_num_bits": 4},
        "deployment_settings": {"target_framework": "openvino"},
    }
    quantized, _ = calibrated(make(), example, settings)
    quantized.export(tmp_path / "model.onnx")
    compiled = openvino.Core().compile_model(str(tmp_path / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    information = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    kinds = [entry["runtimePrecision"].astype(str) for entry in information if entry["layerType"].astype(str) == "Convolution"]
    assert kinds.count("u8") == 5
