"""Rewrites the exporter's graph before it becomes a file: shapes, products, names."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_cco.compat.onnx_exporter import scopes_text
from lightning_cco.export.deployed_forward import PREFIX
from lightning_cco.export.moving_operators import PICKS, RESHAPES

NAME = "lightning_cco.quantizer"
"""Metadata of a QuantizeLinear: the name of its quantizer."""
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators of a file that multiply by weights."""


def constant(value: Any) -> np.ndarray[Any, Any] | None:
    """What a value is in every run; `None` if that depends on the input."""
    import onnx_ir

    tensor = onnx_ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor.numpy() if tensor is not None else None


def initializer(graph: Any, name: str, array: np.ndarray[Any, Any]) -> Any:
    """Add a constant to a graph."""
    import onnx_ir

    tensor = onnx_ir.tensor(array, name=name)
    value = onnx_ir.Value(name=name, const_value=tensor, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(tensor.dtype))
    graph.initializers[name] = value
    return value


def fix_shapes(graph: Any) -> None:
    """Write a shape of known sizes and one unknown as a constant with -1: engines then need not put it together in every run."""
    import onnx_ir

    for node in graph:
        maker = node.inputs[1].producer() if node.op_type == "Reshape" else None
        if maker is None or maker.op_type != "Concat":
            continue
        known = [onnx_ir.convenience.get_const_tensor(value) for value in maker.inputs]
        unknown = [value for value, tensor in zip(maker.inputs, known, strict=True) if tensor is None]
        if len(unknown) != 1 or unknown[0].shape is None or list(unknown[0].shape) != [1]:
            continue  # one part may hold several sizes: the leading ones of a tensor, as it is
        sizes = [size for tensor in known for size in ([-1] if tensor is None else tensor.numpy().tolist())]
        if sizes.count(-1) == 1 and 0 not in sizes:
            node.replace_input_with(1, initializer(graph, f"{node.outputs[0].name}_shape", np.array(sizes, np.int64)))


def index_integers(graph: Any) -> None:
    """Pick from the integers of a rounded tensor and scale what was picked, not the other way round.

    Engines move a DequantizeLinear past what only reshapes a tensor; past what picks from it or repeats it (``x[:, 0]``, reflected borders, pixel shuffle, an
    interpolation to the nearest) they may not, and compute the layer that reads it in float.
    """
    for node in list(graph):  # in order: what is put together of picked values may be picked from again, as where two axes are rolled
        if node.op_type == "Concat" and (of_one := _of_one_scale(node)) is not None:
            for number, dequantize in enumerate(of_one):
                node.replace_input_with(number, dequantize.inputs[0])
            _dequantize_after(graph, node, of_one[0].inputs[0].dtype, of_one[0].inputs[1:])
            continue
        dequantize = node.inputs[0].producer() if node.inputs and (picks(node) or _leads_to_a_pick(node)) else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or any(value.is_graph_output() for value in node.outputs):
            continue
        levels, *format_ = dequantize.inputs
        scale = constant(format_[0])
        if levels.producer() is None or scale is None or scale.ndim:
            continue
        node.replace_input_with(0, levels)
        if node.op_type == "Pad" and not _mirrors(node):
            border = initializer(graph, f"{node.outputs[0].name}_border", np.asarray(constant(format_[1])).reshape(()))
            node.resize_inputs(max(3, len(node.inputs)))
            node.replace_input_with(2, border)
        _dequantize_after(graph, node, levels.dtype, format_)


def _dequantize_after(graph: Any, node: Any, dtype: Any, format_: Sequence[Any]) -> None:
    """Scale what a node makes of integers, for all of its readers."""
    import onnx_ir

    for number, output in enumerate(node.outputs):
        uses = tuple(output.uses())
        after = onnx_ir.node("DequantizeLinear", [output, *format_], name=f"{node.name}.{number}_dequantize")
        after.metadata_props.update({key: value for key, value in node.metadata_props.items() if key != NAME})
        after.outputs[0].name, after.outputs[0].dtype, after.outputs[0].shape = f"{output.name}_as_float", output.dtype, output.shape
        output.dtype = dtype
        graph.insert_after(node, after)
        for reader, position in uses:
            reader.replace_input_with(position, after.outputs[0])


def _of_one_scale(concat: Any) -> list[Any] | None:
    """What a node puts together, if it is all of one rounded tensor, such as the two parts of one that is rolled, and not rounded again."""
    makers = [value.producer() for value in concat.inputs]
    if any(maker is None or maker.op_type != "DequantizeLinear" or maker.inputs[0].producer() is None for maker in makers):
        return None
    if concat.outputs[0].is_graph_output() or _is_rounded_again(concat):
        return None
    formats = {tuple(value.name for value in maker.inputs[1:]) for maker in makers}
    scale = constant(makers[0].inputs[1])
    return makers if len(formats) == 1 and scale is not None and not scale.ndim else None


def _leads_to_a_pick(node: Any) -> bool:
    """Whether a node only reshapes what an operator then picks from, or puts together: to pick along the last axes, or to repeat along a new one."""
    if node.op_type not in RESHAPES:
        return False
    return any(
        (reader.op_type == "Concat" and not _is_rounded_again(reader)) or (position == 0 and (picks(reader) or _leads_to_a_pick(reader)))
        for reader, position in node.outputs[0].uses()
    )


def _is_rounded_again(concat: Any) -> bool:
    """Whether what is put together is rounded again: engines have a form of their own for it."""
    return any(reader.op_type == "QuantizeLinear" for reader, _ in concat.outputs[0].uses())


def picks(node: Any) -> bool:
    """Whether a node picks values of its first input, or repeats them."""
    if node.op_type == "Pad":
        return _mirrors(node) or _adds_zeros(node)
    return node.op_type in PICKS or (node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") == "nearest")


def _mirrors(pad: Any) -> bool:
    return bool(pad.attributes.get_string("mode", "constant") != "constant")


def _adds_zeros(pad: Any) -> bool:
    """Whether a border is of zeros, and read by what engines do not take it into."""
    border = constant(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] is not None else np.zeros(())
    readers = {reader.op_type for reader, _ in pad.outputs[0].uses()}
    return border is not None and not np.any(border) and not readers & {"Conv", "MaxPool", "AveragePool"}


def share_constants(graph: Any) -> None:
    """Store what a layer that is called many times has of constants once: weights, scales, biases."""
    kept: dict[tuple[Any, ...], Any] = {}
    blocks = {value for node in graph if node.op_type == "DequantizeLinear" and "block_size" in node.attributes for value in node.inputs}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        parameter = value.name.startswith(f"{PREFIX}.") and "lifted_tensor" not in value.name  # under its name, and once already
        if tensor is None or parameter or value in blocks or tensor.size < 2 or value.is_graph_input() or value.is_graph_output():
            continue
        array = tensor.numpy()
        key = tensor.dtype, array.shape, hashlib.sha256(array.tobytes()).digest()
        first = kept.setdefault(key, value)
        if first is not value:
            value.replace_all_uses_with(first)
            del graph.initializers[value.name]


def own_zero_points(graph: Any) -> None:
    """Give each weight a zero point of its own.

    ONNX Runtime 1.32 can't load a file with a shared one where exact products are asked for on a processor without VNNI
    (``session.x64quantprecision``).
    """
    owned: dict[Any, Any] = {}
    for node in list(graph):
        if node.op_type == "DequantizeLinear" and len(node.inputs) == 3 and node.inputs[0].producer() is None:
            zeros = constant(node.inputs[2])
            if zeros is not None:
                key = node.inputs[0].name, zeros.shape
                if key not in owned:
                    owned[key] = initializer(graph, f"{node.outputs[0].name}_zero_point", zeros)
                node.replace_input_with(2, owned[key])


def within_bits(integers: np.ndarray[Any, Any], bits: int) -> bool:
    """Whether integers fit into so many bits of their kind, signed or not."""
    first = -(1 << (bits - 1)) if integers.dtype.kind == "i" else 0
    return bool(integers.min(initial=0) >= first and integers.max(initial=0) < first + (1 << bits))


def pack_int4(graph: Any, blocks_alone: bool) -> None:
    """Store the integers of dequantized weights that fit into 4 bits so.

    Args:
        graph: The exporter's graph.
        blocks_alone: Whether only those in groups, with a scale each.
    """
    import ml_dtypes
    import onnx_ir

    for node in graph:
        value = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if value is None or value.const_value is None or value.dtype not in (onnx_ir.DataType.INT8, onnx_ir.DataType.UINT8):
            continue
        blocks = "block_size" in node.attributes
        if not blocks and (blocks_alone or value.dtype == onnx_ir.DataType.UINT8):
            continue
        narrow = ml_dtypes.int4 if value.dtype == onnx_ir.DataType.INT8 else ml_dtypes.uint4
        integers, zeros = value.const_value.numpy(), constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if within_bits(integers, 4) and (zeros is None or within_bits(zeros, 4)):
            # A tied embedding looks the same integers up in a wider type.
            name = f"{value.name}.int4"
            node.replace_input_with(0, graph.initializers.get(name) or initializer(graph, name, integers.astype(narrow)))
            if zeros is not None and zeros.any():
                node.replace_input_with(2, initializer(graph, f"{node.outputs[0].name}_zero_point_int4", zeros.astype(narrow)))
            else:
                node.resize_inputs(2)  # its zero point was of the other type; 0 is the default


def name_nodes(graph: Any) -> None:
    """Call quantize nodes after their layers; the second of a layer gets ``.2``, and so on."""
    keys = [(node, node.metadata_props[NAME]) for node in graph if NAME in node.metadata_props]
    taken: dict[str, int] = {}
    for node, key in keys:
        count = taken[key] = taken.get(key, 0) + 1
        name = key if count == 1 else f"{key}.{count}"
        node.name = f"{name}_quantize"
        clip = next((reader for reader, _ in node.outputs[0].uses() if reader.op_type == "Clip"), None)
        if clip is not None:  # of a format of fewer than 8 bits
            node.outputs[0].name = f"{name}_unclipped"
            node, clip.name = clip, f"{name}_clip"
        node.outputs[0].name = f"{name}_quantized"
        for reader, _ in node.outputs[0].uses():
            if reader.op_type == "DequantizeLinear":
                reader.name = f"{name}_dequantize"
                if not reader.outputs[0].is_graph_output():
                    reader.outputs[0].name = f"{name}_dequantized"


def name_parameters(graph: Any) -> None:
    """Call parameters what the model calls them."""
    for value in list(graph.initializers.values()):
        name = value.name.removeprefix(f"{PREFIX}.")
        if name != value.name and name not in graph.initializers:
            value.name = name


def free_names(graph: Any, names: list[str]) -> None:
    """Call what is inside of a graph otherwise than its inputs and outputs: an argument of the user's may be called as an operator's result is (``cat``)."""
    import onnx_ir

    ends = {id(value) for value in (*graph.inputs, *graph.outputs)}
    inner = [value for node in onnx_ir.traversal.RecursiveGraphIterator(graph) for value in node.outputs if id(value) not in ends]
    held = [value for value in graph.initializers.values() if id(value) not in ends]
    known = {value.name for value in (*inner, *held)} | set(names)
    for value in (*inner, *held):
        if value.name not in names:
            continue
        number = next(number for number in itertools.count(1) if f"{value.name}_{number}" not in known)
        other = f"{value.name}_{number}"
        known.add(other)
        if value.is_initializer():
            del graph.initializers[value.name]
            value.name = other
            graph.initializers[other] = value
        else:
            value.name = other


def name_inputs(graph: Any, names: list[str]) -> None:
    """Call inputs what the model's forward, or the user, calls them."""
    for value, name in zip(graph.inputs, names, strict=True):
        value.name = name


def name_outputs(graph: Any, keys: list[str]) -> None:
    """Call outputs what the model's forward calls them: the keys of a mapping or the fields of a dataclass."""
    for value, key in zip(graph.outputs, keys, strict=True):
        value.name = key


def take_modules(graph: Any) -> dict[str, str]:
    """Module path of each node by its name. The exporter's own remarks, stack traces among them, are taken off: they can outweigh a small model."""
    modules = {}
    for node in graph:
        scopes = scopes_text(node)
        parts = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
        module = next((part for part in reversed(parts[:-1]) if part), "")
        modules[node.name] = module.removeprefix(PREFIX).removeprefix(".")
        node.metadata_props.clear()
    return modules


def drop_traces(graph: Any) -> None:
    """Take out what the exporter notes of its trace, and types of constants that these have themselves: a third of a small network's file."""
    graph.metadata_props.clear()
    for node in graph:
        for value in node.outputs:
            value.metadata_props.clear()
    for value in graph.initializers.values():
        value.metadata_props.clear()
        value.type = value.shape = None
    for value in (*graph.inputs, *graph.outputs):
        value.metadata_props.clear()
