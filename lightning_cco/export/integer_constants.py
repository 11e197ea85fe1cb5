"""Moves what the exporter does to dequantized weights onto their integers.

Slices and rows in another order (the gates of a recurrent layer); more than two dimensions that become a matrix (the weight of an einsum).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_cco.export.onnx_passes import constant, initializer

_Constants = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]", "np.ndarray[Any, Any]", int]
"""Integers, scales, zero points, and the axis that these are along."""


def arrange_integers(graph: Any) -> None:
    """Slice, join, permute and reshape the integers of weights once, here, and not their dequantized values in every run.

    It also leaves each constant to one DequantizeLinear, of which some engines make one for each reader otherwise.
    """
    import onnx_ir

    for node in list(graph):
        found = _arranged(node)
        if found is None:
            continue
        integers, scale, zero_point, axis = found
        output = node.outputs[0]
        inputs = [initializer(graph, f"{output.name}.{i}", array) for i, array in enumerate((integers, scale, zero_point))]
        attributes = {"axis": axis} if scale.ndim else {}
        after = onnx_ir.node("DequantizeLinear", inputs, attributes=attributes, name=f"{node.name}_dequantize")
        after.metadata_props.update(node.metadata_props)
        after.outputs[0].name, after.outputs[0].dtype, after.outputs[0].shape = f"{output.name}_as_float", output.dtype, output.shape
        graph.insert_after(node, after)
        output.replace_all_uses_with(after.outputs[0])


def _arranged(node: Any) -> _Constants | None:
    """What a node makes of dequantized constants, as integers; `None` where that can't be said."""
    if any(value.is_graph_output() for value in node.outputs):
        return None
    if node.op_type in ("Reshape", "Transpose"):
        return _moved(node)
    if node.op_type not in ("Slice", "Concat", "Unsqueeze"):
        return None
    given = [_constants(value) for value in (node.inputs if node.op_type == "Concat" else node.inputs[:1])]
    if not given or any(one is None for one in given):
        return None
    parts = [one for one in given if one is not None]
    axis = parts[0][3]
    if node.op_type == "Unsqueeze":
        where = constant(node.inputs[1])
        if where is None or where.tolist() != [0]:
            return None
        integers, scale, zero_point, axis = parts[0]
        return integers[None], scale, zero_point, axis + 1
    if any(part[3] != axis for part in parts):
        return None
    if node.op_type == "Concat":
        along = node.attributes.get_int("axis", 0) % parts[0][0].ndim
        if along != axis:  # all parts on one grid
            same = all(np.array_equal(part[i], parts[0][i]) for part in parts for i in (1, 2))
            return (np.concatenate([part[0] for part in parts], along), *parts[0][1:]) if same else None
        joined = [np.concatenate([part[i] for part in parts], axis if i == 0 else 0) for i in range(3)]
        return joined[0], joined[1], joined[2], axis
    bounds = [constant(value) for value in node.inputs[1:]]
    if len(bounds) < 3 or any(bound is None or bound.shape != (1,) for bound in bounds):
        return None
    start, end, along, *step = (int(bound[0]) for bound in bounds if bound is not None)
    if step not in ([], [1]):
        return None
    integers, scale, zero_point, _ = parts[0]
    along %= integers.ndim
    if along != axis:
        return np.take(integers, range(*slice(start, end).indices(integers.shape[along])), along), scale, zero_point, axis
    return np.take(integers, range(*slice(start, end).indices(integers.shape[axis])), axis), scale[start:end], zero_point[start:end], axis


def _moved(node: Any) -> _Constants | None:
    """A permuted or reshaped constant; `None` where its scales are along no single axis of it. A matrix that is only transposed is `store_transposed`'s."""
    found = _constants(node.inputs[0], along_none=True)
    if found is None or (node.op_type == "Transpose" and found[0].ndim == 2):
        return None
    integers, scale, zero_point, axis = found
    if node.op_type == "Transpose":
        order = list(node.attributes.get_ints("perm", range(integers.ndim)[::-1]))
        return np.ascontiguousarray(integers.transpose(order)), scale, zero_point, order.index(axis % integers.ndim) if scale.ndim else axis
    shape = constant(node.inputs[1])
    if shape is None or np.any(shape == 0) or shape.size == 0:
        return None
    moved = integers.reshape(shape)
    if not scale.ndim:
        return moved, scale, zero_point, axis
    # Which scale each number has, by its place: those of an axis that holds all of them in turn are the scales of that axis.
    of_each = np.arange(scale.size).reshape([-1 if dim == axis % integers.ndim else 1 for dim in range(integers.ndim)])
    of_each = np.broadcast_to(of_each, integers.shape).reshape(shape)
    for along in range(of_each.ndim):
        first = of_each[tuple(slice(None) if dim == along else slice(1) for dim in range(of_each.ndim))]
        if np.array_equal(of_each, np.broadcast_to(first, of_each.shape)):
            return moved, scale[first.reshape(-1)], zero_point[first.reshape(-1)], along
    return None


def _constants(value: Any, along_none: bool = False) -> _Constants | None:
    """What a dequantized constant is made of, if it has a scale along an axis, or is allowed to have one alone."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) != 3 or node.inputs[0].producer() is not None:
        return None
    arrays = [constant(one) for one in node.inputs]
    if arrays[0] is None or arrays[1] is None or arrays[2] is None or "block_size" in node.attributes:
        return None
    if arrays[1].ndim != 1 and not (along_none and arrays[1].ndim == 0):
        return None
    return arrays[0], arrays[1], arrays[2], node.attributes.get_int("axis", 1)
