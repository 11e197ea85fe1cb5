"""What is computed twice in a model and once in its file is compared with the one, and biases are exact where weights of 4 bits are computed in float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lightning_cco import quantize

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


def network(outputs: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, outputs))


class Twice(nn.Module):
    """Computes its features anew for each of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = network(8), network()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.head(self.body(x)), self.body(x) * 2, self.head(self.body(x)).softmax(-1)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_module_that_is_called_again_on_the_same(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    model, x = Twice().eval(), torch.randn(16, 8)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "model.onnx")
    written = onnx.load(tmp_path / "model.onnx")
    assert (
        sum(node.op_type == "Gemm" for node in written.graph.node) == 7
    )  # of 15; the last layer of the body is in float where its output is one of the model
    assert not report.uncompared
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    with torch.no_grad():
        for given, expected in zip(session.run(None, {"x": x.numpy()}), model(x), strict=True):
            np.testing.assert_allclose(given, expected.numpy(), atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("seed", [1])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_biases_beside_packed_weights(bits: int, seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    model, x = network().eval(), torch.randn(16, 8)
    quantized = quantize(model, {"global_quantization_settings": {"weights_num_bits": bits, "activations_num_bits": 4}}, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "model.onnx", int4=True)
    assert report.sqnr_db > 50
