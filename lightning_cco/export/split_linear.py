"""A linear layer whose result is split into parts, such as query, key and value, as one product for each part.

The same integers, scales and sums. An engine that adds the bias and splits in passes of their own over the one wide result saves one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_cco.export.onnx_passes import constant, initializer


def split_products(graph: Any) -> None:
    """Rewrite each linear layer on an int8 weight that is read in parts only: split along its last axis, or reshaped, permuted and picked from."""
    for node in list(graph):
        if node.op_type == "Split":
            _at_split(graph, node)
        elif node.op_type == "Reshape":
            _at_reshape(graph, node)


def fill_biases(graph: Any) -> None:
    """Give the bias of each product of fixed sizes and more than two dimensions as many; see `engines.FileFeature.FULL_BIASES`."""
    for node in list(graph):
        if node.op_type != "Add":
            continue
        for number, value in enumerate(node.inputs):
            bias, product = constant(value), node.inputs[1 - number]
            maker = product.producer() if product is not None else None
            if bias is None or bias.ndim != 1 or maker is None or maker.op_type != "MatMul":
                continue
            sizes = list(product.shape or maker.inputs[0].shape or ())  # the parts of a split product have no shape written on them
            if len(sizes) > 2 and all(isinstance(size, int) for size in sizes):
                full = bias.reshape((1,) * (len(sizes) - 1) + bias.shape)
                node.replace_input_with(number, initializer(graph, f"{node.outputs[0].name}_bias", full))


def store_transposed(graph: Any) -> None:
    """Store the weight of each product as the product reads it: without a Transpose between it and its DequantizeLinear.

    A weight that something else reads as well, such as a tied embedding's table, stays: it would be stored twice.
    """
    import onnx_ir

    for transpose in list(graph):
        dequantize = transpose.inputs[0].producer() if transpose.op_type == "Transpose" else None
        if (
            dequantize is None
            or dequantize.op_type != "DequantizeLinear"
            or "block_size" in dequantize.attributes
            or transpose.outputs[0].is_graph_output()
        ):
            continue
        integers = constant(dequantize.inputs[0])
        readers = [reader for reader, _ in dequantize.inputs[0].uses()]
        if integers is None or integers.ndim != 2 or list(transpose.attributes.get_ints("perm", ())) != [1, 0]:
            continue
        results = [use for reader in readers for use, _ in reader.outputs[0].uses()]
        if any(reader.op_type != "DequantizeLinear" for reader in readers) or any(reader.op_type != "Transpose" for reader in results):
            continue
        value = initializer(graph, f"{transpose.outputs[0].name}_integers", np.ascontiguousarray(integers.T))
        axis = onnx_ir.AttrInt64("axis", 1 - dequantize.attributes.get_int("axis", 1) % 2)
        stored = _like(graph, transpose, dequantize, [value, *dequantize.inputs[1:]], f".{transpose.outputs[0].name}", {"axis": axis})
        transpose.outputs[0].replace_all_uses_with(stored)


@dataclass(frozen=True)
class _Linear:
    """The nodes of ``Add(MatMul(x, Transpose(DequantizeLinear(integers, scale, zero_point))), bias)``; without a bias there is no Add."""

    add: Any | None
    matmul: Any
    transpose: Any
    dequantize: Any
    constants: list[np.ndarray[Any, Any]]
    bias: np.ndarray[Any, Any] | None


def _quantized_linear(value: Any) -> _Linear | None:
    """The linear layer on an int8 weight whose result a value is, if nothing else reads what is in between."""
    add = value.producer()
    if add is not None and add.op_type == "Add" and constant(add.inputs[1]) is not None:
        value = add.inputs[0]
    else:
        add = None
    chain = [value.producer()]
    for operator in ("Transpose", "DequantizeLinear"):
        inputs = chain[-1].inputs if chain[-1] is not None else ()
        chain.append(inputs[-1 if operator == "Transpose" else 0].producer() if inputs else None)
        if chain[-1] is None or chain[-1].op_type != operator:
            return None
    matmul, transpose, dequantize = chain
    constants = [array for array in map(constant, dequantize.inputs) if array is not None]
    between = [node.outputs[0] for node in (matmul, add) if node is not None]
    single = all(len(result.uses()) == 1 and not result.is_graph_output() for result in between)
    if matmul.op_type != "MatMul" or not single or len(constants) < len(dequantize.inputs) or constants[0].ndim != 2:
        return None
    bias = constant(add.inputs[1]) if add is not None else None
    return (
        None if bias is not None and bias.shape != constants[0].shape[:1] else _Linear(add, matmul, transpose, dequantize, constants, bias)
    )


def _at_split(graph: Any, split: Any) -> None:
    """``chunk`` or ``split`` along the last axis."""
    from onnx_ir.convenience import replace_all_uses_with

    linear, shape = _quantized_linear(split.inputs[0]), split.inputs[0].shape
    if linear is None or shape is None or split.attributes.get_int("axis", 0) not in (-1, len(shape) - 1):
        return
    width, count = len(linear.constants[0]), len(split.outputs)
    sizes = constant(split.inputs[1]) if len(split.inputs) > 1 else None
    ends = np.cumsum(sizes) if sizes is not None else np.minimum((np.arange(count) + 1) * -(-width // count), width)
    for part, old in zip(_parts(graph, split, linear, [int(end) for end in ends]), split.outputs, strict=True):
        part.shape = old.shape
        replace_all_uses_with(old, part, replace_graph_outputs=True)


def _at_reshape(graph: Any, reshape: Any) -> None:
    """``reshape(…, 3, heads, width).permute(2, …)`` whose first axis is then indexed or unbound."""
    import onnx_ir

    linear, shape = _quantized_linear(reshape.inputs[0]), _sizes(reshape.inputs[1])
    readers = [node for node, _ in reshape.outputs[0].uses()]
    if linear is None or shape is None or len(readers) != 1 or readers[0].op_type != "Transpose":
        return
    transpose = readers[0]
    order = list(transpose.attributes.get_ints("perm"))
    picks = [_pick(node) for node, _ in transpose.outputs[0].uses()]
    if not picks or any(pick is None for pick in picks) or reshape.outputs[0].is_graph_output() or transpose.outputs[0].is_graph_output():
        return
    axis = order[0]
    if not all(isinstance(size, int) for size in shape[axis:]):
        return
    width = len(linear.constants[0])
    if shape[axis:].count(-1) == 1:
        shape[shape.index(-1, axis)] = width // -int(np.prod(shape[axis:]))
    count, inner = shape[axis], shape[axis + 1 :]
    # The parts must be the outermost factor of the linear layer's features.
    if min([count, *inner]) < 1 or count * int(np.prod(inner)) != width:
        return
    parts = _parts(graph, reshape, linear, [width // count * (number + 1) for number in range(count)])
    kept = [size for position, size in enumerate(shape) if position != axis]
    sizes = _shape_of(graph, reshape, kept)
    perm = onnx_ir.AttrInt64s("perm", [position - (position > axis) for position in order if position != axis])
    for index, old in (pick for pick in picks if pick is not None):
        shaped = _like(graph, reshape, reshape, [parts[index], sizes], f".{old.name}")
        part = _like(graph, reshape, transpose, [shaped], f".{old.name}", {"perm": perm})
        part.shape = old.shape
        onnx_ir.convenience.replace_all_uses_with(old, part, replace_graph_outputs=True)


def _sizes(value: Any) -> list[Any] | None:
    """A shape by its sizes: numbers, and values of one number where they are computed."""
    known = constant(value)
    if known is not None:
        return [int(size) for size in known.reshape(-1)]
    maker = value.producer()
    if maker is None or maker.op_type != "Concat":
        return None
    sizes: list[Any] = []
    for part in maker.inputs:
        known = constant(part)
        if known is None and (part.shape is None or list(part.shape) != [1]):
            return None
        sizes += [part] if known is None else [int(size) for size in known.reshape(-1)]
    return sizes


def _shape_of(graph: Any, reshape: Any, sizes: list[Any]) -> Any:
    """A shape of numbers and values, as a constant if there are numbers alone."""
    name = f"{reshape.outputs[0].name}.part_shape"
    if all(isinstance(size, int) for size in sizes):
        return initializer(graph, name, np.array(sizes, np.int64))
    parts = [
        initializer(graph, f"{name}.{number}", np.array([size], np.int64)) if isinstance(size, int) else size
        for number, size in enumerate(sizes)
    ]
    return _like(graph, reshape, reshape.inputs[1].producer(), parts, ".part_shape")


def _pick(node: Any) -> tuple[int, Any] | None:
    """Which element of the first axis a node takes, and the value that it gives: Gather of one index, or Slice of one and Squeeze."""
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
        index = constant(node.inputs[1])
        return (int(index), node.outputs[0]) if index is not None and index.ndim == 0 and index >= 0 else None
    readers = [reader for reader, _ in node.outputs[0].uses()] if node.op_type == "Slice" else []
    if len(readers) != 1 or readers[0].op_type != "Squeeze" or len(node.inputs) not in (3, 4):
        return None
    start, end, axes, squeezed = (constant(value) for value in (*node.inputs[1:4], readers[0].inputs[-1]))
    if any(array is None or array.shape != (1,) for array in (start, end, axes, squeezed)):
        return None
    first, last, along, gone = (int(array[0]) for array in (start, end, axes, squeezed) if array is not None)
    return (first, readers[0].outputs[0]) if last == first + 1 and along == gone == 0 <= first else None


def _parts(graph: Any, before: Any, linear: _Linear, ends: list[int]) -> list[Any]:
    """Results of the linear layer's parts, which end at the given features."""
    found = []
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        suffix = f".part_{number}"
        constants = zip(linear.dequantize.inputs, linear.constants, strict=True)
        name = f"{linear.matmul.outputs[0].name}{suffix}"
        inputs = [initializer(graph, f"{name}.{value.name}", array[start:end] if array.ndim else array) for value, array in constants]
        own = f".{name}"  # layers may share one weight, or have equal ones, which are stored once
        weight = _like(graph, before, linear.dequantize, inputs, own)
        value = _like(graph, before, linear.transpose, [weight], own)
        value = _like(graph, before, linear.matmul, [linear.matmul.inputs[0], value], suffix)
        if linear.bias is not None:
            addend = initializer(graph, f"{name}.bias", linear.bias[start:end])
            value = _like(graph, before, linear.add, [value, addend], suffix)
        found.append(value)
    return found


def _like(graph: Any, before: Any, node: Any, inputs: list[Any], suffix: str, attributes: dict[str, Any] | None = None) -> Any:
    """Add a copy of a node that reads other values; its output."""
    import onnx_ir

    made = onnx_ir.node(node.op_type, inputs, attributes=dict(node.attributes) | (attributes or {}), name=f"{node.name}{suffix}")
    made.outputs[0].name, made.outputs[0].dtype = f"{node.outputs[0].name}{suffix}", node.outputs[0].dtype
    made.metadata_props.update(node.metadata_props)
    graph.insert_before(before, made)
    return made.outputs[0]
