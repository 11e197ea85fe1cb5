"""A trace may take branches of the model's that no forward takes: what they compute is in the file, in float, and every layer keeps its own rounding."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Masked(nn.Module):
    """Adds a mask while it is traced, as Hugging Face's attention does, before its layers' additions; or leaves one out."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(8, 8) for _ in range(4))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        traced = torch.compiler.is_compiling() or torch.compiler.is_exporting()
        mask = torch.zeros(1, 4, 8)
        if traced and self.way == "more":
            mask = mask + x * 0.0
        h = F.relu(self.first(x)) + self.second(x)
        if not (traced and self.way == "fewer"):
            h = h + mask
        return self.last(F.relu(h + F.relu(self.third(h))))


@pytest.mark.parametrize("way", ["more", "fewer"])
def test_each_layer_keeps_its_own_rounding(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4, 8)
    model = Masked(way).eval()
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "a.onnx")
    assert {entry.layer for entry in report.layers} >= {"relu", "add"}
    assert report.largest_steps <= 1
    with torch.no_grad():
        expected = model(x)
    found = onnxruntime.InferenceSession(tmp_path / "a.onnx").run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-2, rtol=0)
