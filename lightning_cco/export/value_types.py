"""Which nodes of an engine's optimized graph compute on floats. ONNX Runtime drops the conversions around an operator that it runs on integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_cco.export.moving_operators import COUNTS, MOVING

_FLOATS = frozenset({1, 10, 11, 16})
"""FLOAT, FLOAT16, DOUBLE and BFLOAT16 of `onnx.TensorProto`."""
_COMPARES = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor", "Not", "IsNaN", "IsInf"}
_GIVES_INTEGERS = _COMPARES | COUNTS | {"QuantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"}
_GIVES_FLOATS = {"DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention"}
_BY_BLOCKS = {"MatMulNBits", "GatherBlockQuantized"}


def computes(node: Any) -> bool:
    """Whether a node of a written file computes; it only moves values, makes sizes or masks, or converts, otherwise."""
    return node.op_type not in MOVING and node.op_type not in _GIVES_INTEGERS


def float_nodes(model: Any) -> Iterator[Any]:
    """The nodes that compute on floats which depend on the model's input, in order; what only moves values and the conversions left out.

    Args:
        model: An `onnx.ModelProto`, nodes in execution order.
    """
    constants = {entry.name for entry in model.graph.initializer}
    integers = {entry.name for entry in model.graph.initializer if entry.data_type not in _FLOATS}
    integers |= {entry.name for entry in model.graph.input if entry.type.tensor_type.elem_type not in _FLOATS}
    for node in model.graph.node:
        read = [name for name in node.input if name]
        varying = [name for name in read if name not in constants]
        if node.op_type == "Constant" or (read and not varying):
            constants.update(node.output)
        if _makes_integers(node, read, integers):
            integers.update(node.output[:1])
        if node.op_type == "TopK":
            integers.update(node.output[1:])
        if node.op_type == "Split" and node.input[0] in integers:
            integers.update(node.output)
        if node.op_type in MOVING or node.op_type in _GIVES_INTEGERS or node.op_type.startswith("QLinear"):
            continue
        if varying and any(name not in integers for name in varying):
            yield node


def _makes_integers(node: Any, read: list[str], integers: set[str]) -> bool:
    kind = node.op_type
    if kind in _GIVES_FLOATS or kind in _BY_BLOCKS:
        return False
    if kind in _GIVES_INTEGERS or kind.startswith("QLinear"):
        return True
    if kind == "Cast":
        return next((entry.i for entry in node.attribute if entry.name == "to"), 1) not in _FLOATS
    if kind in ("Constant", "ConstantOfShape"):
        value = next((entry.t.data_type for entry in node.attribute if entry.name == "value"), 1)
        return value not in _FLOATS
    if kind == "QGemm":
        return len(node.input) > 7  # with the scale and zero point of an output in integers
    if kind == "Where" and len(read) > 1:
        return read[1] in integers
    return bool(read) and read[0] in integers
