"""Each layer of a file is compared with fake-quantization on the very inputs that the engine's layer had; one that is wrong is refused and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_case import MODELS, calibrated
from export_harm import Harm, Written, change, nodes, own
from export_models import MobileNetV2
from torch import Tensor, nn

from lightning_cco import CCOError

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


def one_weight(array: Any) -> Any:
    array.reshape(-1)[array.size // 2] ^= 9
    return array


def swapped(array: Any) -> Any:
    array[[0, 1]] = array[[1, 0]]
    return array


def dequantize_of(model: onnx.ModelProto, kind: str, number: int, inputs: int = 1) -> onnx.NodeProto:
    """What dequantizes the weight of a node."""
    value = nodes(model, kind)[number].input[inputs]
    while True:
        maker = next(node for node in model.graph.node if value in node.output)
        if maker.op_type == "DequantizeLinear":
            return maker
        value = maker.input[0]


def weight(kind: str, number: int, how: Any = one_weight) -> Harm:
    return lambda model: change(model, dequantize_of(model, kind, number).input[0], how)


def scale(kind: str, number: int) -> Harm:
    return lambda model: own(model, dequantize_of(model, kind, number), 1, lambda array: array * np.float32(1.01))


def bias(kind: str, number: int) -> Harm:
    def harm(model: onnx.ModelProto) -> None:
        value = nodes(model, kind)[number].input[2]
        maker = next(node for node in model.graph.node if value in node.output)
        own(model, maker, 0, lambda array: array + np.abs(array).max() // 10)

    return harm


def added_bias(number: int) -> Harm:
    """The bias of a product that is handed over in float."""

    def harm(model: onnx.ModelProto) -> None:
        constants = {entry.name for entry in model.graph.initializer}
        adds = [node for node in nodes(model, "Add") if node.input[1] in constants]
        own(model, adds[number], 1, swapped)

    return harm


def format_of(name: str, number: int, how: Any) -> Harm:
    def harm(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.name in (f"{name}_quantize", f"{name}_dequantize"):
                own(model, node, number, how)

    return harm


def without_clamp(name: str) -> Harm:
    def harm(model: onnx.ModelProto) -> None:
        clip = next(node for node in model.graph.node if node.name == f"{name}_clip")
        own(model, clip, 2, lambda array: np.full_like(array, 255))

    return harm


def table(dtype: str) -> Harm:
    def harm(model: onnx.ModelProto) -> None:
        values = {entry.name: onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer}
        node = next(node for node in nodes(model, "Gather") if node.input[0] in values and values[node.input[0]].dtype == dtype)
        change(model, node.input[0], lambda array: swapped(array) if array.dtype == np.int8 else array * np.float32(1.02))

    return harm


FEW_BITS = {"global_quantization_settings": {"weights_num_bits": 4, "activations_num_bits": 6}}
OPENVINO, TENSORRT = ({"deployment_settings": {"target_framework": name}} for name in ("openvino", "tensorrt"))

CASES: dict[str, tuple[str, Any, Harm, str]] = {
    "one weight": ("residual", None, weight("Conv", 1), "conv_1"),
    "swapped channels": ("residual", None, weight("Conv", 2, swapped), "conv_2"),
    "weight scale": ("residual", None, scale("Conv", 1), "conv_1"),
    "bias": ("residual", None, bias("Conv", 2), "conv_2"),
    "one weight, tensorrt": ("residual", TENSORRT, weight("Conv", 1), "conv_1"),
    "zero point, openvino": ("residual", OPENVINO, format_of("relu_1", 2, lambda array: array + np.uint8(1)), "relu_1"),
    "scale": ("residual", None, format_of("relu_1", 1, lambda array: array * np.float32(1.02)), "relu_1"),
    "input on blocks": ("mobilenet", None, weight("Conv", 0), "conv"),
    "depthwise": ("mobilenet", None, weight("Conv", 1, swapped), "conv_1"),
    "missing clamp": ("residual", FEW_BITS, without_clamp("relu_1"), "relu_1"),
    "weight of 4 bits": ("residual", FEW_BITS, weight("Conv", 1), "conv_1"),
    "part of a split product": ("vit", None, weight("MatMul", 1), "linear"),
    # Not rounded itself, and split: the first rounded layer that reads it is named.
    "bias in float": ("vit", None, added_bias(0), "scaled_dot_product_attention"),
    "table": ("decoder", None, table("int8"), "embedding"),
    "scales of a table": ("lstm", None, table("float32"), "embedding"),
    "recurrent weight": ("lstm", None, lambda model: change(model, nodes(model, "LSTM")[0].input[1], one_weight), "lstm"),
    "linear after the LSTM": ("lstm", None, weight("Gemm", 0), "linear"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Any], Written]:
    files: dict[str, Written] = {}

    def get(name: str, settings: Any) -> Written:
        key = f"{name} {settings}"
        if key not in files:
            make, example, _ = MODELS[name]
            files[key] = Written(calibrated(make(), example, settings)[0], tmp_path_factory.mktemp("written"))
        return files[key]

    return get


@pytest.mark.parametrize("case", CASES)
def test_a_layer_that_is_wrong_is_named(case: str, written: Callable[[str, Any], Written]) -> None:
    name, settings, harm, layer = CASES[case]
    with pytest.raises(CCOError, match=rf"differs from the fake-quantized model: (layer )?'{layer}'"):
        written(name, settings).checked(harm)


@pytest.mark.parametrize("name", ["residual", "mobilenet", "vit", "lstm", "decoder"])
def test_a_layer_that_is_right_is_a_step_off_at_most(name: str, written: Callable[[str, Any], Written]) -> None:
    file = written(name, None)
    report = file.checked()
    assert [entry.layer for entry in report.layers if not entry.layer.endswith(".operand")] == list(file.quantized.plan.tensors)
    assert report.uncompared == report.faults == {}
    assert report.largest_steps <= 1
    assert report.mean_steps < 0.01
    assert report.local_difference < 1e-5
    assert report.variations == 1 + file.sizes  # one of other sizes where they vary
    names = {layer.name for layer in file.quantized.graph}
    assert all(set(island.layers) <= names for island in report.float_islands)


@pytest.mark.slow
def test_a_deep_net_of_random_weights_is_right_layer_by_layer(tmp_path: Path) -> None:
    """From end to end its roundings add up: differences double every few layers."""
    stages = tuple((expand, out // 4, count, stride) for expand, out, count, stride in MobileNetV2.STAGES)
    quantized, _ = calibrated(MobileNetV2(stages, 64, 10), lambda: torch.randn(2, 3, 32, 32))
    report = quantized.export(tmp_path / "model.onnx")
    assert len([layer for layer in quantized.graph if layer.kind == "conv"]) == 52
    assert report.largest_steps <= 1
    assert not [island for island in report.float_islands if "planned in INT8" in island.reason]


class Coordinates(nn.Module):
    """Coordinates of the pixels beside their values, as CoordConv has them: two constants of one layer, each expanded to the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(5, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        rows = torch.linspace(-1, 1, height).view(1, 1, -1, 1).expand(n, 1, height, width)
        columns = torch.linspace(-2, 1, width).view(1, 1, 1, -1).expand(n, 1, height, width)
        return self.head(torch.relu(self.conv(torch.cat([x, rows, columns], 1))))


def test_each_constant_of_a_layer_is_compared_with_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quantized, _ = calibrated(Coordinates(), lambda: torch.randn(4, 3, 12, 12))
    report = quantized.export(tmp_path / "model.onnx")
    assert {"concat.operand", "concat.operand_2"} <= {entry.layer for entry in report.layers}
    assert report.largest_steps <= 1
    assert report.sqnr_db > 40
    assert not capfd.readouterr().err  # what was tried and failed (other sizes of images) is nobody's concern
