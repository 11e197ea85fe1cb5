"""Sizes that a file counts from values, for engines that make mistakes where a Shape operator reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lightning_cco.export.onnx_passes import initializer


def count_sizes(graph: Any) -> None:
    """In a graph with convolutions, put the number of values along an axis in the place of each ``Shape`` operator that reads an unknown size.

    A size is the number of values along its axis, at the first place of all others, that are not less than themselves; so NaNs count as well. What is
    counted depends on values, so no engine takes it for a size.
    """
    if not any(node.op_type in ("Conv", "ConvTranspose") for node in graph):
        return
    for node in [node for node in graph if node.op_type == "Shape"]:
        source = node.inputs[0]
        if source.shape is None or source.dtype is None or node.outputs[0].is_graph_output():
            continue
        rank = len(source.shape)
        axes = range(rank)[slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", rank))]
        if axes and not all(isinstance(source.shape[axis], int) for axis in axes):
            _replace(graph, node, [_size(graph, node, source, axis) for axis in axes])


def _size(graph: Any, shape: Any, source: Any, axis: int) -> Any:
    """The size of an axis, int64 of 1."""
    known = source.shape[axis]
    name = f"{shape.outputs[0].name}.{axis}"
    if isinstance(known, int):
        return initializer(graph, name, np.array([known], np.int64))
    import onnx_ir

    nodes = list(_counting(graph, name, source, axis))
    graph.insert_before(shape, nodes)
    counted = nodes[-1].outputs[0]
    counted.name, counted.dtype, counted.shape = name, onnx_ir.DataType.INT64, onnx_ir.Shape([1])
    return counted


def _counting(graph: Any, name: str, source: Any, axis: int) -> Iterator[Any]:
    """The operators that count, in order."""
    import onnx_ir

    first = initializer(graph, f"{name}.first", np.array(0, np.int64))
    value = source
    for other in reversed(range(len(source.shape))):
        if other != axis:
            picked = onnx_ir.node("Gather", [value, first], {"axis": other}, name=f"{name}.pick_{other}")
            yield picked
            value = picked.outputs[0]
    if source.dtype == onnx_ir.DataType.BOOL:
        cast = onnx_ir.node("Cast", [value], {"to": onnx_ir.DataType.FLOAT}, name=f"{name}.cast")
        yield cast
        value = cast.outputs[0]
    less = onnx_ir.node("Less", [value, value], name=f"{name}.less")
    not_less = onnx_ir.node("Not", [less.outputs[0]], name=f"{name}.not_less")
    ones = onnx_ir.node("Cast", [not_less.outputs[0]], {"to": onnx_ir.DataType.INT64}, name=f"{name}.ones")
    yield from (less, not_less, ones)
    along = initializer(graph, f"{name}.along", np.array([0], np.int64))
    yield onnx_ir.node("ReduceSum", [ones.outputs[0], along], {"keepdims": 1}, name=f"{name}.count")


def _replace(graph: Any, shape: Any, sizes: list[Any]) -> None:
    """Let everybody read other sizes than those of a ``Shape`` operator."""
    import onnx_ir

    found = sizes[0]
    if len(sizes) > 1:
        joined = onnx_ir.node("Concat", sizes, {"axis": 0}, name=f"{shape.outputs[0].name}.sizes")
        graph.insert_before(shape, joined)
        found = joined.outputs[0]
        found.name, found.dtype, found.shape = joined.name, onnx_ir.DataType.INT64, onnx_ir.Shape([len(sizes)])
    shape.outputs[0].replace_all_uses_with(found)
    graph.remove(shape, safe=True)
