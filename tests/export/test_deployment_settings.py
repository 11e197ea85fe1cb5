"""What the recipe says of the file holds for every way to export: by the callback, from `quantize`, on the next day."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from models import GuideCNN

import lightning_cco as cc

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


def types_in_file(path: Path) -> set[int]:
    return {tensor.data_type for tensor in onnx.load(path).graph.initializer}


def quantized(deployment: dict[str, Any]) -> cc.QuantizedModel:
    torch.manual_seed(0)
    recipe = {"global_quantization_settings": {"weights_num_bits": 4}, "deployment_settings": deployment}
    made = cc.quantize(GuideCNN().eval(), recipe, (GuideCNN.example(),))
    made.calibrate([GuideCNN.example()])
    return made


@pytest.mark.parametrize(("options", "packed"), [({}, True), ({"int4": False}, False)])
def test_weights_are_packed_as_the_plan_says(options: dict[str, Any], packed: bool, tmp_path: Path) -> None:
    model = quantized({"int4": True})
    assert model.plan.packed
    report = model.export_onnx(tmp_path / "model.onnx", **options)
    assert (onnx.TensorProto.INT4 in types_in_file(tmp_path / "model.onnx")) == packed
    assert report.size_bytes == (tmp_path / "model.onnx").stat().st_size


@pytest.mark.slow
def test_floats_have_16_bits_as_the_recipe_says(tmp_path: Path) -> None:
    quantized({"target_framework": "tensorrt", "fp16": True}).export(tmp_path / "model.onnx")
    assert onnx.TensorProto.FLOAT16 in types_in_file(tmp_path / "model.onnx")


def test_what_the_engine_does_not_take_is_refused_when_it_is_exported(tmp_path: Path) -> None:
    with pytest.raises(cc.CCOError, match=r"int4|4-bit"):
        quantized({"target_framework": "tensorrt", "int4": True}).export(tmp_path / "model.onnx")
