"""Quantize and dequantize operators around each operator, for engines that read a file in such units: dequantize, one operator, quantize."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_cco.export.moving_operators import RESHAPES
from lightning_cco.export.onnx_passes import NAME, constant, initializer, picks


def carry_pairs(graph: Any) -> None:
    """Quantize and dequantize once more after what only moves the values of a rounded tensor."""
    for node in list(graph):
        dequantize = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None and _moves(node) else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or dequantize.inputs[0].producer() is None:
            continue
        format_ = dequantize.inputs[1:]
        scale = constant(format_[0])
        if scale is None or scale.ndim:
            continue
        for number, output in enumerate(node.outputs):
            readers = [(reader, position) for reader, position in output.uses() if reader.op_type != "QuantizeLinear"]
            if readers and not output.is_graph_output():
                suffix = f".{number}" if len(node.outputs) > 1 else ""
                _pair_after(graph, node, output, format_, dequantize.inputs[0].dtype, readers, f"{node.name}{suffix}")


def clamp_between_pairs(graph: Any) -> None:
    """Write the clamp of a rounded tensor's integers as one of floats between two pairs of the same format: the same values, in the form of a unit."""
    for node in list(graph):
        quantize = node.inputs[0].producer() if node.op_type == "Clip" else None
        if quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        scale, zero = (constant(value) for value in quantize.inputs[1:])
        if scale is None or zero is None:
            continue
        integers, source = node.outputs[0], quantize.outputs[0]
        levels = [int(np.asarray(constant(value))) for value in node.inputs[1:]]
        floats = [np.float32((level - int(zero.reshape(()))) * float(scale.reshape(()))) for level in levels]
        bounds = [initializer(graph, f"{integers.name}_bound_{i}", np.asarray(bound, np.float32)) for i, bound in enumerate(floats)]
        first = _made("DequantizeLinear", [source, *quantize.inputs[1:]], f"{node.name}_unclamped", quantize, quantize.inputs[0])
        clamp = _made("Clip", [first.outputs[0], *bounds], f"{node.name}_floats", quantize, quantize.inputs[0])
        second = _made("QuantizeLinear", [clamp.outputs[0], *quantize.inputs[1:]], f"{node.name}_again", quantize, integers)
        if NAME in quantize.metadata_props:
            second.metadata_props[NAME] = quantize.metadata_props.pop(NAME)
        graph.insert_after(node, [first, clamp, second])
        integers.replace_all_uses_with(second.outputs[0])
        graph.remove(node, safe=True)


def round_tables(graph: Any) -> None:
    """Look up rows of a table that is rounded in the file, where what is looked up is rounded: QNN cuts the levels of float constants off instead."""
    import onnx_ir

    for node in list(graph):
        table = constant(node.inputs[0]) if node.op_type == "Gather" else None
        readers = [reader for reader, _ in node.outputs[0].uses()]
        if table is None or table.dtype.kind != "f" or not readers or any(reader.op_type != "QuantizeLinear" for reader in readers):
            continue
        format_ = readers[0].inputs[1:]
        scale, zero = (constant(value) for value in format_)
        if scale is None or zero is None or scale.ndim or any(reader.inputs[1:] != format_ for reader in readers):
            continue
        info, name = np.iinfo(zero.dtype), node.outputs[0].name
        levels = np.clip(np.rint(table * (np.float32(1) / scale)) + int(zero.reshape(())), info.min, info.max).astype(zero.dtype)
        stored = initializer(graph, f"{name}_table", levels)
        dequantize = _made("DequantizeLinear", [stored, *format_], f"{node.name}_rounded", node, node.inputs[0])
        dequantize.outputs[0].dtype = onnx_ir.DataType.FLOAT
        graph.insert_before(node, dequantize)
        node.replace_input_with(0, dequantize.outputs[0])


def _moves(node: Any) -> bool:
    """Whether each result is a value of the first argument, or 0: rounding it once more changes nothing."""
    return node.op_type in ("MaxPool", "Pad", *RESHAPES) or picks(node)


def _pair_after(graph: Any, node: Any, output: Any, format_: Any, dtype: Any, readers: list[tuple[Any, int]], name: str) -> None:
    quantize = _made("QuantizeLinear", [output, *format_], f"{name}_carried", node, output)
    quantize.outputs[0].dtype = dtype
    dequantize = _made("DequantizeLinear", [quantize.outputs[0], *format_], f"{name}_carried_on", node, output)
    graph.insert_after(node, [quantize, dequantize])
    for reader, position in readers:
        reader.replace_input_with(position, dequantize.outputs[0])


def _made(operator: str, inputs: list[Any], name: str, like: Any, shaped: Any) -> Any:
    """A node that belongs to the layer of another one, with a result of a value's type and shape."""
    import onnx_ir

    made = onnx_ir.node(operator, inputs, name=name)
    made.metadata_props.update({key: value for key, value in like.metadata_props.items() if key != NAME})
    made.outputs[0].name, made.outputs[0].dtype, made.outputs[0].shape = f"{name}_values", shaped.dtype, shaped.shape
    return made
