"""Sizes that are counted from values are those of a Shape operator."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from lightning_cco.export.counted_sizes import count_sizes

TYPES = {np.float32: TensorProto.FLOAT, np.int64: TensorProto.INT64, np.uint8: TensorProto.UINT8, np.bool_: TensorProto.BOOL}


def sizes_in_ort(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["sizes"], {"x": x, "image": np.zeros((1, 1, 2, 2), np.float32)})[0]


def model_with(type_: int, rank: int, attributes: dict[str, int], convolution: bool = True) -> onnx.ModelProto:
    """Sizes of ``x`` beside a convolution of ``image``."""
    x = helper.make_tensor_value_info("x", type_, [f"size_{axis}" if axis != 1 else 3 for axis in range(rank)])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 2, 2])
    nodes = [helper.make_node("Shape", ["x"], ["read"], **attributes), helper.make_node("Identity", ["read"], ["sizes"])]
    nodes.append(helper.make_node("Conv", ["image", "w"], ["y"]) if convolution else helper.make_node("Relu", ["image"], ["y"]))
    outputs = [
        helper.make_tensor_value_info("sizes", TensorProto.INT64, ["k"]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1, 2, 2]),
    ]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1, 1, 1, 1], [1.0])
    return helper.make_model(
        helper.make_graph(nodes, "g", [x, image], outputs, [weight]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize(
    ("rank", "attributes"), [(1, {}), (3, {}), (4, {"start": 0, "end": 1}), (4, {"start": 2}), (4, {"start": -2, "end": -1})]
)
def test_what_is_counted_is_the_size(type_: type, rank: int, attributes: dict[str, int]) -> None:
    x = np.zeros([5, 3, 7, 2][:rank], type_)
    if type_ is np.float32:
        x[...] = np.nan
    model = model_with(TYPES[type_], rank, attributes)
    expected = sizes_in_ort(model, x)
    counted = onnx_ir.from_proto(model)
    count_sizes(counted.graph)
    assert all(node.op_type != "Shape" for node in counted.graph)
    rewritten = onnx_ir.to_proto(counted)
    onnx.checker.check_model(rewritten)
    np.testing.assert_array_equal(sizes_in_ort(rewritten, x), expected)


def test_sizes_that_are_known_and_files_without_convolutions_stay() -> None:
    for model in (model_with(TensorProto.FLOAT, 3, {"start": 1, "end": 2}), model_with(TensorProto.FLOAT, 3, {}, convolution=False)):
        before = onnx_ir.from_proto(model)
        count_sizes(before.graph)
        assert [node.op_type for node in before.graph].count("Shape") == 1
