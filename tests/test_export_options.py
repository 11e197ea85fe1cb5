"""Every option of an export is honoured, or refused by name before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from models import GuideCNN

from lightning_cco import CCOError, QuantizedModel, quantize

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
LOOSE: dict[str, Any] = {"min_sqnr_db": 0.0, "max_mean_steps": 99.0}


@pytest.fixture(scope="module")
def quantized() -> QuantizedModel:
    torch.manual_seed(0)
    x = GuideCNN.example()
    made = quantize(GuideCNN().eval(), None, (x,))
    made.calibrate([(x,)])
    return made


def shapes(path: Path) -> list[tuple[str, list[Any]]]:
    graph = onnx.load(path).graph
    sizes = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in (*graph.input, *graph.output)]
    return [(value.name, size) for value, size in zip((*graph.input, *graph.output), sizes, strict=True)]


DIM = torch.export.Dim


@pytest.mark.parametrize(
    ("options", "name", "axes"),
    [
        ({}, "x", ["batch"]),
        ({"input_names": ["image"], "output_names": ["logits"]}, "image", ["batch"]),
        ({"dynamic_axes": {"x": {0: "n"}, "output_0": {0: "n"}}}, "x", ["n"]),
        ({"dynamic_axes": {"x": [0]}}, "x", ["x_0"]),
        ({"input_names": ["image"], "dynamic_axes": {"image": {0: "n", 2: "h", 3: "w"}}}, "image", ["n", 1, "h", "w"]),
        ({"dynamic_shapes": {"x": {0: "n"}}}, "x", ["n"]),
        ({"dynamic_shapes": ({0: DIM("n"), 2: DIM("h", min=4, max=64), 3: DIM("w")},)}, "x", ["n", 1, "h", "w"]),
        ({"dynamic_shapes": {"x": (DIM.AUTO, None, None, None)}}, "x", ["x_0"]),
        ({"dynamic_shapes": [{0: DIM.DYNAMIC}]}, "x", ["x_0"]),
    ],
)
def test_names_and_axes_are_what_was_asked_for(
    quantized: QuantizedModel, options: dict[str, Any], name: str, axes: list[Any], tmp_path: Path
) -> None:
    quantized.export(tmp_path / "model.onnx", check=False, **options)
    (given, sizes), (output, _) = shapes(tmp_path / "model.onnx")
    assert given == name
    assert sizes[: len(axes)] == axes
    assert output == options.get("output_names", ["output_0"])[0]


@pytest.mark.parametrize("opset", [17, 20, 23])
def test_the_opset_is_the_one_asked_for(quantized: QuantizedModel, opset: int, tmp_path: Path) -> None:
    quantized.export(tmp_path / "model.onnx", opset_version=opset, **LOOSE)
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [opset]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"opset_version": 11}, r"opset_version=11 .*one of \[17, 18"),
        ({"f": "a.onnx"}, "option f='a.onnx'.*first argument"),
        ({"dynamo": False}, "dynamo=False is not possible"),
        ({"export_params": False}, "export_params=False"),
        ({"do_constant_folding": False}, "do_constant_folding=False.*optimize=False"),
        ({"keep_initializers_as_inputs": True}, "keep_initializers_as_inputs=True"),
        ({"training": torch.onnx.TrainingMode.TRAINING}, "training=.*evaluation"),
        ({"operator_export_type": torch.onnx.OperatorExportTypes.ONNX_FALLTHROUGH}, "operator_export_type"),
        ({"report": True}, "report=True"),
        ({"opset": 17}, "unknown option 'opset'.*opset_version"),
        ({"dynamic_axis": {}}, "unknown option 'dynamic_axis'.*Did you mean dynamic_axes"),
        ({"input_names": "image"}, "input_names expects a list"),
        ({"input_names": ["a", "b"]}, "input_names has 2 names, but the file has 1"),
        ({"output_names": ["a", "a"]}, "different names"),
        ({"dynamic_axes": {"image": {0: "n"}}}, r"dynamic_axes names \['image'\]; the file's inputs are \['x'"),
        ({"dynamic_shapes": {"image": {0: "n"}}}, r"dynamic_shapes names \['image'\].*\['x'\]"),
        ({"dynamic_shapes": ({7: "n"},)}, r"'x' has 4 axes.*axis 7"),
        ({"dynamic_axes": {"x": {0: "n"}}, "dynamic_shapes": ({0: "n"},)}, "Give one of them"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_can_not_be_honoured_is_refused_by_name(quantized: QuantizedModel, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CCOError, match=said):
        quantized.export(tmp_path / "model.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_changes_nothing_is_taken(quantized: QuantizedModel, tmp_path: Path) -> None:
    same = {"dynamo": True, "export_params": True, "do_constant_folding": True, "training": torch.onnx.TrainingMode.EVAL}
    quantized.export(tmp_path / "model.onnx", verbose=False, optimize=False, external_data=True, **same)
    assert (tmp_path / "model.onnx").exists()


def test_a_program_takes_dynamic_shapes_and_no_option_of_onnx(quantized: QuantizedModel, tmp_path: Path) -> None:
    with pytest.raises(CCOError, match=r"\.pt2.*\['opset_version'\]"):
        quantized.export(tmp_path / "model.pt2", opset_version=20)
    quantized.export(tmp_path / "model.pt2", dynamic_shapes={"x": {0: "n"}})
    x = GuideCNN.example()[:3]
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), quantized.model(x))
