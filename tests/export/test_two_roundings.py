"""Two roundings one after the other, as of a clamp of what is rounded already: the engine does both, and reads the next layer's bias by the second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from engine_files import File, reference
from torch import Tensor, nn

from lightning_cco import quantize

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


@pytest.mark.parametrize("separate", [True, False])
def test_ort_separate_pairs(separate: bool, tmp_path: Path) -> None:
    file = File()
    x = file.rounded("x", 0.002)
    x = file.rounded(file.node("LeakyRelu", x, alpha=1.0) if separate else x, 0.00206)
    levels = file.constant(np.linspace(-15000, 15000, 8).astype(np.int32))
    bias = file.node("DequantizeLinear", levels, file.constant(np.full(8, 0.00206 * 0.01, np.float32)), axis=0)
    path = file.save(tmp_path / "a.onnx", (2, 3, 8, 8), file.rounded(file.node("Conv", x, file.weight(8, 3, 3, 3, most=20), bias), 0.005))
    images = np.random.default_rng(1).uniform(-0.2, 0.2, (2, 3, 8, 8)).astype(np.float32)
    got = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": images})[0]
    assert bool(np.abs((got - reference(path, images)).mean((0, 2, 3))).max() < 0.001) is separate


class Clamped(nn.Module):
    """A convolution whose ReLU is followed by another one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Conv2d(3, 8, 3), nn.Dropout(), nn.Conv2d(8, 4, 1)
        nn.init.uniform_(self.second.bias, -4.0, 4.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.drop(torch.relu(self.first(x)))))


def test_a_clamp_of_what_is_rounded_already(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    quantized = quantize(Clamped().eval(), {"global_quantization_settings": {"skip_tail_quantization": False}}, (x,))
    quantized.calibrate([x])
    quantized.activations["relu_1"].scale.mul_(1.04)  # as steps of the training move it
    report = quantized.export(tmp_path / "a.onnx")
    assert report.sqnr_db > 45
    assert not report.float_islands
