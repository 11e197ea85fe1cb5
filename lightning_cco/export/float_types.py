"""Types of floats in a file: what is rounded to integers is computed in float32, whatever the model computes it in.

Engines have no integer form of an operator on float16, bfloat16 or double, and none if a cast is between an operator and its quantizer. Of 8 bits,
16-bit floats change less than half a step: the integers are the same without them.
"""

from __future__ import annotations

from typing import Any

from lightning_cco.export.moving_operators import RESHAPES
from lightning_cco.export.onnx_passes import picks


def compute_in_float32(graph: Any) -> list[str]:
    """Take 16-bit floats out of a graph, and doubles where it only converts to them and back; the types of its inputs and outputs stay.

    Returns:
        The names of the types that were taken out.
    """
    import onnx_ir

    narrow = (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)
    if not any(_rounds(node) for node in graph) or any(_body_computes_in(node, (*narrow, onnx_ir.DataType.DOUBLE)) for node in graph):
        return []
    found = {value.dtype for node in graph for value in node.outputs if value.dtype in narrow}
    _widen(graph, narrow)
    _round_in_float32(graph)
    _drop_round_trips(graph)
    return sorted(dtype.name.lower() for dtype in found)


def _rounds(node: Any) -> bool:
    return bool(node.op_type == "QuantizeLinear")


def _body_computes_in(node: Any, types: tuple[Any, ...]) -> bool:
    """Whether a branch or a loop that a node holds reads or makes values of these types: both of its ends would have to change with it."""
    import onnx_ir

    bodies: list[Any] = []
    for entry in node.attributes.values():
        bodies += [entry.value] if entry.type == onnx_ir.AttributeType.GRAPH else []
        bodies += list(entry.value) if entry.type == onnx_ir.AttributeType.GRAPHS else []
    parts = [part for body in bodies for part in onnx_ir.traversal.RecursiveGraphIterator(body)]
    values = [value for part in parts for value in (*part.inputs, *part.outputs) if value is not None]
    values += [value for body in bodies for value in (*body.inputs, *body.outputs)] + (list(node.outputs) if bodies else [])
    return any(value.dtype in types for value in values)


def _widen(graph: Any, narrow: tuple[Any, ...]) -> None:
    """Make float32 of all that is of a narrower type inside a graph."""
    import numpy as np
    import onnx_ir

    wide = onnx_ir.DataType.FLOAT
    for value in list(graph.initializers.values()):
        if value.dtype in narrow and value.const_value is not None and not value.is_graph_input() and not value.is_graph_output():
            value.const_value = onnx_ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.dtype = wide
    for value in graph.inputs:
        if value.dtype in narrow and value.uses():
            uses = tuple(value.uses())
            cast = _cast(value, wide, f"{value.name}_as_float32")
            for reader, position in uses:
                reader.replace_input_with(position, cast.outputs[0])
            graph.insert_before(graph[0], cast)
    for node in list(graph):
        _widen_attributes(node, narrow)
        for value in node.outputs:
            if value.dtype in narrow and value.is_graph_output():
                _returned_as(graph, node, value)
            elif value.dtype in narrow:
                value.dtype = wide


def _widen_attributes(node: Any, narrow: tuple[Any, ...]) -> None:
    """Let a node make float32 of what it converts to, or holds."""
    import numpy as np
    import onnx_ir

    for name, entry in list(node.attributes.items()):
        if entry.type == onnx_ir.AttributeType.TENSOR and entry.value.dtype in narrow:
            node.attributes[name] = onnx_ir.AttrTensor(name, onnx_ir.tensor(entry.value.numpy().astype(np.float32)))
        elif name in ("to", "dtype") and entry.type == onnx_ir.AttributeType.INT and entry.value in [int(one) for one in narrow]:
            node.attributes[name] = onnx_ir.AttrInt64(name, int(onnx_ir.DataType.FLOAT))


def _returned_as(graph: Any, node: Any, value: Any) -> None:
    """Compute an output of the graph in float32, and convert it where it leaves."""
    import onnx_ir

    narrow = value.dtype
    value.dtype = onnx_ir.DataType.FLOAT
    cast = _cast(value, narrow, f"{value.name}_returned")
    graph.insert_after(node, cast)
    for number, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[number] = cast.outputs[0]


def _round_in_float32(graph: Any) -> None:
    """Convert what is still of another type before it is rounded, and back after it: scales are float32."""
    import onnx_ir

    for node in list(graph):
        read = node.inputs[0] if node.inputs else None
        if _rounds(node) and read is not None and read.dtype == onnx_ir.DataType.DOUBLE:
            before = _cast(read, onnx_ir.DataType.FLOAT, f"{node.outputs[0].name}_rounded")
            graph.insert_before(node, before)
            node.replace_input_with(0, before.outputs[0])
        elif node.op_type == "DequantizeLinear" and node.outputs[0].dtype == onnx_ir.DataType.DOUBLE:
            scaled = node.outputs[0]
            uses = tuple(scaled.uses())
            scaled.dtype = onnx_ir.DataType.FLOAT
            after = _cast(scaled, onnx_ir.DataType.DOUBLE, f"{scaled.name}_as_double")
            graph.insert_after(node, after)
            for reader, position in uses:
                reader.replace_input_with(position, after.outputs[0])


def _drop_round_trips(graph: Any) -> None:
    """Take out a conversion from float32 and the one back, also around what only moves values."""
    import onnx_ir

    wide = onnx_ir.DataType.FLOAT
    for back in list(graph):
        if back.op_type != "Cast" or back.attributes.get_int("to", 0) != int(wide) or back.outputs[0].is_graph_output():
            continue
        between = []
        value = back.inputs[0]
        maker = value.producer()
        while maker is not None and (maker.op_type in RESHAPES or picks(maker)) and len(maker.outputs) == 1 and len(value.uses()) == 1:
            between.append(maker)
            value = maker.inputs[0]
            maker = value.producer()
        if value.dtype == wide:
            start = value
        elif maker is not None and maker.op_type == "Cast" and maker.inputs[0].dtype == wide and value.dtype == onnx_ir.DataType.DOUBLE:
            start = maker.inputs[0]
        else:
            continue
        if between:
            between[-1].replace_input_with(0, start)
            for node in between:
                node.outputs[0].dtype = wide
            start = between[0].outputs[0]
        back.outputs[0].replace_all_uses_with(start)
    for node in reversed(list(graph)):  # a conversion that nobody reads would pass for a reader in float
        if node.op_type == "Cast" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)


def _cast(value: Any, dtype: Any, name: str) -> Any:
    import onnx_ir

    node = onnx_ir.node("Cast", [value], {"to": int(dtype)}, name=name)
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, dtype, value.shape
    return node
