"""A trace may take branches of the model's that no forward takes: what they compute is in the file, in float, and every layer keeps its own rounding."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import CCOError, CCOWarning, QuantizedModel, quantize

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


class Exported(nn.Module):
    """Calls a layer otherwise while it is exported."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        exported = torch.compiler.is_exporting()
        if self.way == "padded":
            h = F.relu(self.second(F.pad(h, (0, 0, 0, 4)) if exported else h))[:, :4]
        elif self.way == "in parts":
            h = F.relu(self.second(h)) if exported else torch.cat([F.relu(self.second(part)) for part in h.chunk(2, 1)], 1)
        elif exported:
            h = F.relu(self.second(h.transpose(0, 1))).transpose(0, 1)
        else:
            h = F.relu(self.second(h))
        return self.last(h)


def _calibrated(way: str) -> tuple[QuantizedModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(16, 4, 8)
    quantized = quantize(Exported(way).eval(), None, (x,))
    quantized.calibrate([x])
    return quantized, x


@pytest.mark.parametrize("way", ["in parts", "elsewhere"])
def test_what_is_not_rounded_in_the_file_is_named_with_its_cause(way: str, tmp_path: Path) -> None:
    quantized, _ = _calibrated(way)
    with pytest.raises(CCOError, match=r"'relu_1'.*could not be compared \(the file does not round it\).*another way while it is exported"):
        quantized.export(tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


def test_what_could_not_be_compared_is_a_warning(tmp_path: Path) -> None:
    quantized, x = _calibrated("padded")
    with pytest.warns(
        CCOWarning, match=r"could not compare 'relu_1' with the file \(of shape \(16, 4, 8\) in the model, \(16, 8, 8\) in the file\)"
    ):
        report = quantized.export(tmp_path / "a.onnx")
    assert list(report.uncompared) == ["relu_1"]
    with torch.no_grad():
        expected = quantized.model(x)
    found = onnxruntime.InferenceSession(tmp_path / "a.onnx").run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-2, rtol=0)
