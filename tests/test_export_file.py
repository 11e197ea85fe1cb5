"""What an exported file holds: the plan's operators and no others, small integers, names."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from export_case import MODELS, calibrated, images, run
from models import GuideCNN, ResidualCNN
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.errors import CCOError
from lightning_cco.export.fold_batch_norm import BatchNorm, integer_weight

QUICK = {"cnn", "mobilenet", "unet", "vit", "tokens"}
pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


def test_what_is_in_the_file(tmp_path: Path) -> None:
    quantized, _ = calibrated(GuideCNN(), GuideCNN.example)
    quantized.export(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["QuantizeLinear"] == 4  # where the plan has them and nowhere else
    types = {entry.name: entry.data_type for entry in model.graph.initializer}
    assert Counter(types.values())[onnx.TensorProto.INT32] == 3  # a bias for each INT8 layer
    shapes = {tuple(entry.dims): entry.data_type for entry in model.graph.initializer}
    assert shapes[8, 4, 3, 3] in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    assert shapes[10, 16] == onnx.TensorProto.FLOAT  # the tail
    assert {node.name for node in model.graph.node} >= {"input_0_quantize", "relu_quantize", "relu_1_quantize", "relu_2_quantize"}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert "linear_1" in json.loads(metadata["lightning_cco.skipped_layers"])
    assert json.loads(metadata["lightning_cco.recipe"])["global_quantization_settings"]["weights_num_bits"] == 8
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def test_quantize_operators_stand_where_the_plan_has_them_and_nowhere_else(name: str, tmp_path: Path) -> None:
    make, example, _ = MODELS[name]
    quantized, _ = calibrated(make(), example)
    quantized.export(tmp_path / "model.onnx", check=False)
    graph = onnx.load(tmp_path / "model.onnx").graph
    # What a visible layer makes is rounded once; an input is, at each of its readers.
    expected = Counter(dict.fromkeys(quantized.plan.tensors, 1))
    for key in quantized.plan.tensors:
        if not quantized.capture.sites[key.partition(":")[0]].visible:
            expected[key] = sum(edge.source == key for edge in quantized.graph.edges)
    computed = [
        entry for entry in quantized.weights if quantized.graph[entry].kind in ("concat", "stack")
    ]  # an expanded parameter beside a tensor
    expected.update({f"{entry}.operand": 1 for entry in computed})
    quantize_nodes = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    found = Counter(node.output[0].removesuffix("_quantized") for node in quantize_nodes)
    base = Counter()
    for key, count in found.items():
        stem, _, number = key.rpartition(".")
        base[stem if number.isdigit() else key] += count
    assert base == expected
    # Each, or what is picked or repeated from it, is dequantized once; all other dequantize operators read integers that the file holds.
    stored = {entry.name: entry.data_type for entry in graph.initializer}
    levels = [node.output[0] for node in quantize_nodes]
    for node in graph.node:
        if node.op_type in ("Gather", "Slice", "Split", "Resize") and node.input[0] in levels:
            levels += node.output
            levels.remove(node.input[0])
    dequantized = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    assert Counter(x for x in dequantized if x not in stored) == Counter(levels)
    assert {stored[x] for x in dequantized if x in stored} <= {onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT32}


@pytest.mark.parametrize("name", ["residual", "mobilenet", "unet"])
def test_a_model_with_its_batch_norms_folded_is_the_model_to_float_rounding(name: str, tmp_path: Path) -> None:
    make, example, _ = MODELS[name]
    quantized, x = calibrated(make(), example)  # factors of either sign
    quantized.export(tmp_path / "model.onnx", check=False)
    assert not any(node.op_type == "BatchNormalization" for node in onnx.load(tmp_path / "model.onnx").graph.node)
    with torch.no_grad():
        expected = quantized.model(x).numpy()
    got = run(tmp_path / "model.onnx", x, optimize=False)
    # A value on the edge between two levels may fall either way; the others agree to float rounding.
    assert np.median(np.abs(got - expected)) < 1e-4 * np.abs(expected).max()
    assert np.square(got - expected).sum() < 1e-4 * np.square(expected).sum()


@pytest.mark.parametrize("name", ["residual", "vit"])
def test_tensorrts_file_follows_its_rules(name: str, tmp_path: Path) -> None:
    make, example, _ = MODELS[name]
    quantized, _ = calibrated(make(), example, {"deployment_settings": {"target_framework": "tensorrt"}})
    report = quantized.export(tmp_path / "model.onnx")
    assert report.sqnr_db > 20
    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    stored |= {node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t) for node in graph.node if node.op_type == "Constant"}
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert stored[node.input[2]].dtype == np.int8  # symmetric: every zero point is 0
            assert not stored[node.input[2]].any()
        if (
            node.op_type in ("Conv", "Gemm", "MatMul")
            and (maker := makers.get(node.input[1])) is not None
            and maker.op_type == "DequantizeLinear"
        ):
            assert stored[maker.input[0]].dtype == np.int8
            if node.op_type == "Conv":
                assert next(a.i for a in maker.attribute if a.name == "axis") == 0  # the output channels
            assert makers[node.input[0]].op_type in ("DequantizeLinear", "Reshape", "Transpose", "MaxPool", "Flatten", "Slice", "Split")
    # A bias stays in float.
    assert not any(array.dtype == np.int32 for array in stored.values())
    biased = [node for node in graph.node if node.op_type in ("Conv", "Gemm") and len(node.input) > 2]
    assert biased
    assert all(stored[node.input[2]].dtype == np.float32 for node in biased)
    if name == "residual":
        for node in graph.node:
            if node.op_type == "Add":
                # A pair stands on the shortcut alone: TensorRT adds in the convolution's kernel, and rounds the sum.
                assert sorted(makers[x].op_type for x in node.input) == ["Conv", "DequantizeLinear"]


def test_weights_of_four_bits_in_four_bits(tmp_path: Path) -> None:
    settings = {"global_quantization_settings": {"weights_num_bits": 4}, "layer_settings": [{"match": "conv", "weights_num_bits": 4}]}
    quantized, x = calibrated(ResidualCNN(), ResidualCNN.example, settings)
    narrow = quantized.export(tmp_path / "int8.onnx")
    packed = quantized.export(tmp_path / "int4.onnx", int4=True)
    assert any("stored in int4" in note for note in packed.notes)
    assert any("stored in int8" in note for note in narrow.notes)
    model = onnx.load(tmp_path / "int4.onnx")
    assert model.opset_import[0].version == 21
    stored = {entry.name: entry for entry in model.graph.initializer}
    weights = [node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored]
    assert {stored[name].data_type for name in weights} == {onnx.TensorProto.INT4, onnx.TensorProto.INT32}
    # The grid of a bias is finer in the file with bytes, so that a value on the edge between two levels may fall the other way.
    expected = run(tmp_path / "int8.onnx", x, optimize=False)
    assert np.square(run(tmp_path / "int4.onnx", x, optimize=False) - expected).sum() < 1e-4 * np.square(expected).sum()


def test_tensorrt_takes_no_single_int4_weights(tmp_path: Path) -> None:
    settings = {"global_quantization_settings": {"weights_num_bits": 4}, "deployment_settings": {"target_framework": "tensorrt"}}
    quantized, _ = calibrated(ResidualCNN(), ResidualCNN.example, settings)
    with pytest.raises(CCOError, match="int4=True"):
        quantized.export(tmp_path / "model.onnx", int4=True)


def test_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.boxes, self.scores = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(8, 3)

        def forward(self, image: Tensor, scale: Tensor) -> dict[str, Tensor]:
            h = torch.relu(self.body(image) * scale)
            return {"scores": self.scores(h), "boxes": self.boxes(h)}

    torch.manual_seed(0)
    example = {"image": torch.randn(3, 4), "scale": torch.rand(3, 8)}
    quantized = quantize(Named().eval(), None, example_kwargs=example)
    quantized.calibrate([example])
    assert quantized.export(tmp_path / "model.onnx").sqnr_db > 20
    session = ort.InferenceSession(str(tmp_path / "model.onnx"))
    assert [entry.name for entry in session.get_inputs()] == ["image", "scale"]
    assert [entry.name for entry in session.get_outputs()] == ["scores", "boxes"]


def test_keyword_arguments_in_another_order_reach_their_inputs(tmp_path: Path) -> None:
    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
            return torch.relu(self.left(first)), self.right(torch.relu(self.left(second)))

    torch.manual_seed(0)
    example = {"second": torch.randn(3, 4), "first": 5 * torch.randn(3, 4)}
    quantized = quantize(Difference().eval(), None, example_kwargs=example)
    quantized.calibrate([example])
    assert quantized.export(tmp_path / "model.onnx").sqnr_db > 20
    session = ort.InferenceSession(str(tmp_path / "model.onnx"))
    got = session.run(None, {name: value.numpy() for name, value in example.items()})
    with torch.no_grad():
        for array, expected in zip(got, quantized.model(**example), strict=True):
            np.testing.assert_allclose(array, expected.numpy(), atol=0.1)


def test_weights_take_a_quarter_of_the_size(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2))
    quantized, _ = calibrated(model, images(8))
    assert quantized.export(tmp_path / "model.onnx").size_ratio < 0.28


@pytest.mark.parametrize("kind", ["conv", "conv_transpose", "linear", "grouped"])
def test_folding_a_batch_norm_is_exact(kind: str) -> None:
    layer = {
        "conv": nn.Conv2d(3, 6, 3, bias=True),
        "conv_transpose": nn.ConvTranspose2d(3, 6, 3),
        "linear": nn.Linear(5, 6),
        "grouped": nn.Conv2d(3, 6, 3, groups=3),
    }[kind]
    norm = nn.BatchNorm1d(6) if kind == "linear" else nn.BatchNorm2d(6)
    model = nn.Sequential(layer, norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(4, 5) if kind == "linear" else torch.randn(4, 3, 7, 7)
    model(x)
    quantized, _ = calibrated(model, lambda: x)
    norm.weight.data[2] = 0.0
    name = "conv" if kind == "grouped" else kind
    assert quantized.plan.folded_after(name) == ["batch_norm"]
    values = BatchNorm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    folded = integer_weight(quantized, name, layer.weight, layer.bias, after={"batch_norm": values})
    assert (folded.scale > 0).all()
    shape = [1] * layer.weight.dim()
    shape[folded.axis] = -1
    weight = folded.integers.float() * folded.scale.reshape(shape)
    function = {"conv": F.conv2d, "conv_transpose": F.conv_transpose2d, "linear": F.linear, "grouped": partial(F.conv2d, groups=3)}[kind]
    with torch.no_grad():
        expected = norm(function(x, quantized.weights[name][0](layer.weight), layer.bias))
        torch.testing.assert_close(function(x, weight, folded.bias), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("settings", "note"), [({"global_quantization_settings": {"weights_num_bits": 4}}, "weights of fewer"),
                                                ({"global_quantization_settings": {"activations_num_bits": 4}}, "activations of fewer"),
                                                ({"deployment_settings": {"target_framework": "tensorrt"}}, "TensorRT")])  # fmt: skip
def test_other_formats_agree_and_are_said(settings: Any, note: str, tmp_path: Path) -> None:
    quantized, _ = calibrated(ResidualCNN(), ResidualCNN.example, settings)
    report = quantized.export(tmp_path / "model.onnx")
    assert report.sqnr_db > 20
    assert any(note in said for said in report.notes)
