"""Which operators the report says run in float: as ONNX Runtime's own profile has the types of what each of them reads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import onnxruntime
import pytest
import torch
from export_case import MODELS, calibrated
from torch import nn

import lightning_cco as cc
from lightning_cco.export.moving_operators import MOVING

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


def profiled(path: Path, values: list[torch.Tensor]) -> Counter[str]:
    """How many nodes of each kind read floats, by the engine's profile; constants, sizes and what only moves values left out."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(path.with_suffix(""))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session.run(None, {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), values, strict=True)})
    events = json.loads(Path(session.end_profiling()).read_text())
    kinds: Counter[str] = Counter()
    for event in events:
        if event["name"].endswith("_kernel_time"):
            kind = event["args"]["op_name"]
            types = [next(iter(entry)) for entry in event["args"]["input_type_shape"] if entry]
            if types and types[0] == "float" and kind not in MOVING and not kind.startswith("QLinear"):
                kinds[kind] += 1
    return kinds


@pytest.mark.parametrize("name", ["residual", "tokens", "vit", "unet"])
def test_as_the_engine_has_run_them(name: str, tmp_path: Path) -> None:
    make, example, _ = MODELS[name]
    quantized, x = calibrated(make(), example)
    report = quantized.export(tmp_path / "model.onnx")
    assert Counter(report.float_nodes) == profiled(tmp_path / "model.onnx", [x])


class Resized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.interpolate(self.first(x).relu(), scale_factor=2, mode="bilinear")
        return self.head(self.second(x).tanh().mean((2, 3)))


def test_a_resize_and_a_tanh_in_float_are_said(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 12, 12)
    quantized = cc.quantize(Resized().eval(), None, (x,))
    quantized.calibrate([(x,)])
    report = quantized.export(tmp_path / "model.onnx")
    assert report.float_nodes["Resize"] == report.float_nodes["Tanh"] == 1
    assert "1 Resize" in str(report)
    assert Counter(report.float_nodes) == profiled(tmp_path / "model.onnx", [x])
