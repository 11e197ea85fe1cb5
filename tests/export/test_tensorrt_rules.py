"""TensorRT's documented rules of explicit quantization, checked on the file: it could not be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from export_case import calibrated
from models import ResidualCNN
from onnx import numpy_helper

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
CHANNELS = {"Conv": 0, "ConvTranspose": 1}


def violations(model: Any) -> list[str]:
    """Scales constant and positive, zero points 0 in int8, rounded tensors with one scale, weights along their output channels, biases in float."""
    constants = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    found = []
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = constants.get(node.input[1]), constants.get(node.input[2]) if len(node.input) > 2 else None
        if scale is None or not np.all(np.isfinite(scale) & (scale > 0)):
            found.append(f"{node.name}: its scale is no positive constant")
        elif zero is None or zero.dtype != np.int8 or np.any(zero):
            found.append(f"{node.name}: its zero point is not 0 in int8")
        elif node.op_type == "QuantizeLinear" and scale.ndim:
            found.append(f"{node.name}: a rounded tensor with several scales")
        elif node.input[0] in constants and constants[node.input[0]].dtype != np.int8:
            found.append(f"{node.name}: a constant that is no int8")
        elif scale.ndim:
            axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
            found += [f"{node.name}: axis {axis}" for kind in readers[node.output[0]] if CHANNELS.get(kind, axis) != axis]
    return found


def test_a_file_breaks_no_rule(tmp_path: Path) -> None:
    settings = {"global_quantization_settings": {"skip_tail_quantization": False}, "deployment_settings": {"target_framework": "tensorrt"}}
    quantized, _ = calibrated(ResidualCNN(), ResidualCNN.example, settings)
    quantized.export(tmp_path / "model.onnx", check=False)
    model = onnx.load(tmp_path / "model.onnx")
    assert violations(model) == []
    node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    scale = next(entry for entry in model.graph.initializer if entry.name == node.input[1])
    scale.CopyFrom(numpy_helper.from_array(np.float32(-1), scale.name))
    assert any("no positive constant" in what for what in violations(model))
