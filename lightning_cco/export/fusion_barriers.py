"""An operator that changes no value, between a layer or a rounding and the rounding after it, where an engine must not see the two side by side.

ONNX Runtime makes integers of float weights of its own accord, with one scale for all of them, where a convolution or a `Gemm` reads a rounded tensor and
its result is rounded: a layer that was skipped because rounding hurts it would run in INT8 after all. And it computes a `Gemm` on integers in float where
its result is rounded for some readers and not for others. A LeakyRelu with slope 1 between layer and rounding prevents both; it is computed together with
the layer. Of two roundings one after the other it makes one, whose scale the integers of the next layer's bias are then read by.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from lightning_cco.export.moving_operators import PASSED
from lightning_cco.export.onnx_passes import NAME, PRODUCTS, constant

_FOLDED = frozenset({"BatchNormalization", "Add", "Sub", "Mul", "Div"})
"""Operators that it takes into the weights, or into the bias, where all else that they read is constant."""
_CLAMPS = frozenset({"Relu", "Clip"})
"""Operators that it takes out before a rounding."""


def keep_float_weights(graph: Any) -> None:
    """Put an operator that changes nothing between each layer with float weights and the rounding of its result, if it reads a rounded tensor."""
    for node in list(graph):
        if node.op_type not in PRODUCTS or constant(node.inputs[1]) is None or not reads_rounded(node.inputs[0]):
            continue
        last = node
        while (after := _only_reader(last)) is not None and after.op_type in _FOLDED and _else_constant(after, last):
            last = after
        if (node.op_type == "MatMul" and last is node) or not goes_to_roundings(last):
            continue
        _separate(graph, last, tuple(last.outputs[0].uses()))


def separate_roundings(graph: Any) -> None:
    """Put an operator that changes nothing between a product on integers and the rounding of its result for some of its readers, if others read it in float."""
    for node in list(graph):
        if node.op_type != "Gemm" or constant(node.inputs[1]) is not None:
            continue
        uses = tuple(node.outputs[0].uses())
        roundings = tuple((reader, position) for reader, position in uses if reader.op_type == "QuantizeLinear")
        if roundings and (len(roundings) < len(uses) or node.outputs[0].is_graph_output()):
            _separate(graph, node, roundings)


def separate_pairs(graph: Any) -> None:
    """Put an operator that changes nothing between two roundings one after the other, if their grids differ."""
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or constant(node.inputs[0]) is not None:
            continue
        roundings = [
            (reader, at) for reader, at in node.outputs[0].uses() if reader.op_type == "QuantizeLinear" and not _same_grid(reader, node)
        ]
        if roundings:
            _separate(graph, node, roundings)


def _same_grid(first: Any, second: Any) -> bool:
    grids = [[constant(value) for value in node.inputs[1:]] for node in (first, second)]
    return len(grids[0]) == len(grids[1]) and all(
        a is not None and b is not None and np.array_equal(a, b) for a, b in zip(*grids, strict=True)
    )


def _separate(graph: Any, node: Any, uses: Iterable[tuple[Any, int]]) -> None:
    """Let some readers of a node's result read it through an operator that changes nothing."""
    import onnx_ir

    output = node.outputs[0]
    same = onnx_ir.node("LeakyRelu", [output], attributes={"alpha": 1.0}, name=f"{node.name}_same")
    same.metadata_props.update({key: value for key, value in node.metadata_props.items() if key != NAME})
    same.outputs[0].name, same.outputs[0].dtype, same.outputs[0].shape = f"{output.name}_same", output.dtype, output.shape
    graph.insert_after(node, same)
    for reader, position in uses:
        reader.replace_input_with(position, same.outputs[0])


def maker_of(value: Any) -> Any | None:
    """The node that a value comes out of, past what only moves values; `None` for a constant or an input."""
    maker = value.producer()
    while maker is not None and maker.op_type in PASSED:
        maker = maker.inputs[0].producer()
    return maker


def reads_rounded(value: Any) -> bool:
    """Whether a value comes out of a DequantizeLinear, past what only moves values."""
    maker = maker_of(value)
    return maker is not None and maker.op_type == "DequantizeLinear"


def goes_to_roundings(node: Any) -> bool:
    """Whether a node's result goes to roundings alone, past clamps and what only moves values."""
    pending = [node]
    while pending:
        output = pending.pop().outputs[0]
        readers = [reader for reader, _ in output.uses()]
        if output.is_graph_output() or not readers:
            return False
        pending += [reader for reader in readers if reader.op_type in PASSED | _CLAMPS]
        if any(reader.op_type not in PASSED | _CLAMPS | {"QuantizeLinear"} for reader in readers):
            return False
    return True


def _only_reader(node: Any) -> Any | None:
    output = node.outputs[0]
    readers = [reader for reader, _ in output.uses()]
    return readers[0] if len(readers) == 1 and not output.is_graph_output() else None


def _else_constant(node: Any, before: Any) -> bool:
    return all(value is None or value is before.outputs[0] or constant(value) is not None for value in node.inputs)
