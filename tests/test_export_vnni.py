"""Files are right on processors whose fast product of unsigned and signed 8-bit integers overflows (x86 without VNNI)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_case import calibrated, run
from torch import Tensor, nn

from lightning_cco.export.engine_patterns import adds_products_exactly
from lightning_cco.monitoring.plan_log import plan_lines


class Extreme(nn.Module):
    """Neighbouring weights of the largest magnitude on inputs of the largest magnitude: any sum of two products in 16 bits is cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped, self.linear, self.head = (
            nn.Conv2d(8, 16, 3),
            nn.Conv2d(16, 16, 3, groups=2),
            nn.Linear(16, 16),
            nn.Linear(16, 4),
        )
        for weight in (self.conv.weight, self.grouped.weight, self.linear.weight):
            nn.init.constant_(weight, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.conv(x))))
        return self.head(torch.relu(self.linear(x.mean((2, 3)))))


def images() -> Tensor:
    return torch.rand(4, 8, 8, 8) + 0.5


def weight_types(path: Path) -> list[Any]:
    graph = onnx.load(path).graph
    stored = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    weights = [stored[node.input[0]] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored]
    return [weight.dtype.type for weight in weights if weight.ndim > 1]


@pytest.mark.parametrize("vnni", [False, None])
def test_the_engines_sums_are_exact(vnni: bool | None, tmp_path: Path) -> None:
    quantized, x = calibrated(Extreme(), images, {"deployment_settings": {"vnni": vnni}})
    report = quantized.export(tmp_path / "model.onnx")
    with torch.no_grad():
        expected = quantized.model(x).numpy()
    np.testing.assert_allclose(run(tmp_path / "model.onnx", x), expected, rtol=0.02)
    assert report.integer_nodes["QLinearConv"] == 2


def test_how_weights_are_stored_is_as_the_processor_or_as_the_settings_say(tmp_path: Path) -> None:
    quantized, _ = calibrated(Extreme(), images)
    deployment = quantized.settings.deployment_settings
    expected = {True: np.int8, False: np.uint8, None: np.int8 if adds_products_exactly() else np.uint8}
    for vnni, kind in expected.items():
        deployment.vnni = vnni
        report = quantized.export(tmp_path / "model.onnx")
        assert weight_types(tmp_path / "model.onnx") == [kind] * 3
        assert any("deployment_settings.vnni" in note for note in report.notes)


def test_narrow_weights_cannot_overflow(tmp_path: Path) -> None:
    settings = {"global_quantization_settings": {"weights_num_bits": 7}, "deployment_settings": {"vnni": False}}
    quantized, _ = calibrated(Extreme(), images, settings)
    quantized.export(tmp_path / "model.onnx")
    assert weight_types(tmp_path / "model.onnx") == [np.int8] * 3


@pytest.mark.parametrize("vnni", [None, False, True])
def test_what_the_export_will_say_of_processors_is_said_before_the_training(vnni: bool | None) -> None:
    """As `export` says it of the file: 8-bit weights overflow in OpenVINO unless the settings have decided for which processors it is."""
    for target in ("openvino", "ort"):
        plan = calibrated(Extreme(), images, {"deployment_settings": {"target_framework": target, "vnni": vnni}})[0].plan
        said = [line for line in plan_lines(plan) if "VNNI" in line]
        assert len(said) == (target == "openvino" and vnni is None)
        assert all("deployment_settings.vnni: false" in line for line in said)


def test_openvino_sums_are_exact_with_weights_of_seven_bits(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    settings = {"deployment_settings": {"target_framework": "openvino", "vnni": False}}
    quantized, x = calibrated(Extreme(), images, settings)
    assert [quantized.plan.decisions[name].weights_num_bits for name in ("conv", "conv_1", "linear")] == [7, 7, 7]
    report = quantized.export(tmp_path / "model.onnx")
    assert not any("overflow" in note for note in report.notes)
    compiled = openvino.Core().compile_model(str(tmp_path / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        expected = quantized.model(x).numpy()
    np.testing.assert_allclose(compiled(x.numpy())[0], expected, rtol=0.02)


class Between(nn.Module):
    """A layer between two in INT8, whose weights alone are integers by the plan."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Conv2d(8, 8, 3), layer, nn.Conv2d(16, 4, 1)
        nn.init.constant_(layer.weight, 0.02)  # type: ignore[arg-type]
        with torch.no_grad():
            layer.weight[..., 0, 0] = 0.01  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.layer(torch.relu(self.first(x)))))


@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        (nn.ConvTranspose2d(8, 16, 2, 2), {}),
        (nn.ConvTranspose2d(8, 16, 3, 2, 1, 1, groups=2), {}),
        (nn.Conv2d(8, 16, 3), {"weight_only": True}),
        (nn.Conv2d(8, 16, 3, groups=2), {"weight_only": True}),
    ],
    ids=["transposed", "transposed in groups", "weight_only", "weight_only in groups"],
)
def test_weights_alone_are_narrow_where_openvino_multiplies_integers(layer: nn.Module, rule: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    rules = [{"match": "layer", **rule}] if rule else []
    settings = {"deployment_settings": {"target_framework": "openvino", "vnni": False}, "layer_settings": rules}
    quantized, x = calibrated(Between(layer), images, settings)
    (name,) = quantized.plan.weight_only
    assert quantized.plan.decisions[name].weights_num_bits == 7
    report = quantized.export(tmp_path / "model.onnx", example_args=(x[:1],), dynamic_batch=False)
    assert report.target_sqnr_db > 40
    assert not any("overflow" in note for note in report.notes)


def test_weights_alone_keep_their_bits_where_openvino_multiplies_floats() -> None:
    settings = {
        "deployment_settings": {"target_framework": "openvino", "vnni": False},
        "layer_settings": [{"match": "*conv*", "skip_quantization": True}, {"match": "layer", "weight_only": True}],
    }
    quantized, _ = calibrated(Between(nn.Conv2d(8, 16, 3)), images, settings)
    assert [quantized.plan.decisions[name].weights_num_bits for name in quantized.plan.weight_only] == [8]


def test_the_report_says_where_eight_bits_overflow_in_openvino(tmp_path: Path) -> None:
    quantized, _ = calibrated(Extreme(), images, {"deployment_settings": {"target_framework": "openvino"}})
    (note,) = (note for note in quantized.export(tmp_path / "model.onnx").notes if "overflow" in note)
    assert ("so on this one" in note) == (not adds_products_exactly())
    assert "deployment_settings.vnni: false" in note
