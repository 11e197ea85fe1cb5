"""Files with floats of 16 bits for what is not in INT8: of the right types, sorted, near to the file before, refused where 16 bits do not hold the values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_case import MODELS, calibrated, run
from onnx import TensorProto
from torch import Tensor, nn

from lightning_cco import CCOError, load_settings, quantize

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
TENSORRT = {"deployment_settings": {"target_framework": "tensorrt"}}


@pytest.mark.parametrize("name", ["residual", "mobilenet", "vit", "decoder", "lstm"])
def test_a_file_of_16_bits_is_near_to_that_of_32(name: str, tmp_path: Path) -> None:
    make, example, _ = MODELS[name]
    quantized, x = calibrated(make(), example, TENSORRT)
    whole, half = tmp_path / "whole.onnx", tmp_path / "half.onnx"
    before = quantized.export(whole)
    report = quantized.export(half, fp16=True)
    model = onnx.load(half)
    onnx.checker.check_model(model, full_check=True)
    assert not [entry.name for entry in model.graph.initializer if entry.data_type == TensorProto.FLOAT]
    assert {entry.type.tensor_type.elem_type for entry in model.graph.output} == {TensorProto.FLOAT}
    assert report.size_bytes == half.stat().st_size < before.size_bytes
    assert any("16 bits" in note for note in report.notes)
    one, other = run(whole, x, optimize=False), run(half, x, optimize=False)
    assert 0 < np.square(one - other).sum() < 1e-3 * np.square(one).sum()


def test_the_integers_are_those_of_the_file_before(tmp_path: Path) -> None:
    quantized, _ = calibrated(MODELS["residual"][0](), MODELS["residual"][1], TENSORRT)
    files = [tmp_path / "whole.onnx", tmp_path / "half.onnx"]
    for path, fp16 in zip(files, (False, True), strict=True):
        quantized.export(path, fp16=fp16, check=False)
    whole, half = (
        {
            entry.name: onnx.numpy_helper.to_array(entry)
            for entry in onnx.load(path).graph.initializer
            if entry.data_type == TensorProto.INT8
        }
        for path in files
    )
    assert whole.keys() == half.keys()
    assert all(np.array_equal(whole[name], half[name]) for name in whole)


class Large(nn.Module):
    """A sum that is beyond 16 bits, between layers that are not."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first, self.second, self.factor = nn.Linear(8, 8), nn.Linear(8, 8), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)) * self.factor / self.factor)


def test_values_that_16_bits_do_not_hold_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    settings = {"global_quantization_settings": {"skip_tail_quantization": False}, **TENSORRT}
    for model, what in ((Large(1e6), "beyond 65,504"), (_scaled(nn.Linear(8, 8), 1e-7), "scale of")):
        quantized = quantize(model.eval(), settings, (x,))
        quantized.calibrate([x])
        with pytest.raises(CCOError, match=what):
            quantized.export(tmp_path / "model.onnx", fp16=True)
        assert not (tmp_path / "model.onnx").exists()


def test_sums_beyond_16_bits_are_found_by_running_the_file(tmp_path: Path) -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.exp(self.first(x).abs() + 12)  # 162,755 and more
            return self.second(torch.log(y))

    torch.manual_seed(0)
    x = torch.randn(16, 8)
    quantized = quantize(Sums().eval(), TENSORRT, (x,))
    quantized.calibrate([x])
    quantized.export(tmp_path / "whole.onnx")
    with pytest.raises(CCOError, match="65,504"):
        quantized.export(tmp_path / "half.onnx", fp16=True)


def _scaled(layer: nn.Linear, factor: float) -> nn.Module:
    with torch.no_grad():
        layer.weight.mul_(factor)
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 8))


def test_other_engines_refuse_it(tmp_path: Path) -> None:
    with pytest.raises(CCOError, match=r"deployment_settings.fp16: .* not for ort"):
        load_settings({"deployment_settings": {"fp16": True}})
    quantized, _ = calibrated(MODELS["cnn"][0](), MODELS["cnn"][1])
    with pytest.raises(CCOError, match="fp16=True with target_framework: ort"):
        quantized.export(tmp_path / "model.onnx", fp16=True)
