"""Core ML: programs in, ``.mlpackage`` folders out, and what these hold. `engine_process` loads it; it imports nothing of lightning_cco."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

_PRODUCTS = {"conv": "conv", "conv_transpose": "conv_transpose", "linear": "linear", "matmul": "matmul"}
_CONVERSIONS = ("quantize", "dequantize", "constexpr_affine_dequantize", "constexpr_blockwise_shift_scale", "cast")
_CLAMPS = ("relu", "relu6", "clip")
_INTEGERS = (*_PRODUCTS, *_CLAMPS, "add", "sub", "mul", "concat", "reduce_mean", "avg_pool", "max_pool")
"""Operators that are said to compute on integers where they stand between conversions."""
_MOVES = frozenset(
    {
        *(
            "const",
            "reshape",
            "transpose",
            "slice_by_index",
            "slice_by_size",
            "split",
            "squeeze",
            "expand_dims",
            "pad",
            "tile",
            "gather",
            "stack",
        ),
        *("identity", "shape", "pixel_shuffle", "fill", "range_1d"),
    }
)
_STRIDES = ("aten.max_pool1d.default", "aten.max_pool2d.default", "aten.avg_pool1d.default", "aten.avg_pool2d.default")
_TOLERANCE = 1e-5
"""Of a scale."""


def convert(source: str, target: str, layer_key: str) -> dict[str, Any]:
    """Convert a program, write it, and read what was written.

    Returns:
        ``integer`` and ``floats``: how many operators of each kind have rounded operands and results, and how many have not; ``conversions``: how many
        quantize or dequantize; ``layers``: operator, layer and whether it has INT8 feeds, of each that computes; ``faults``: by layer, what is stored
        otherwise than the program has it.
    """
    import coremltools

    program = torch.export.load(source).run_decompositions({})
    for node in program.graph.nodes:
        if str(node.target) in _STRIDES and len(node.args) == 2:
            node.args = (*node.args, node.args[1])  # a pooling strides by its size, unless it says otherwise; the converter asks for it
    model = coremltools.convert(
        program,
        minimum_deployment_target=coremltools.target.iOS17,
        convert_to="mlprogram",
        compute_precision=coremltools.precision.FLOAT32,
        skip_model_load=True,
    )
    model.save(target)
    read = _ConvertedProgram(program, list(model._mil_program.functions["main"].operations), layer_key)
    return read.counted()


class _ConvertedProgram:
    """A converted program beside the one that it was made of; what belongs together has one name."""

    def __init__(self, program: Any, operations: list[Any], layer_key: str) -> None:
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._operations, self._layer_key = operations, layer_key
        signature = program.graph_signature
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        self._constants = {name: program.state_dict.get(path, program.constants.get(path)) for name, path in held.items()}

    def counted(self) -> dict[str, Any]:
        """What `convert` gives."""
        integer: Counter[str] = Counter()
        floats: Counter[str] = Counter()
        layers, faults, conversions = [], {}, 0
        for operation in self._operations:
            kind = operation.op_type
            conversions += kind in ("quantize", "dequantize")
            if kind in _CONVERSIONS or kind in _MOVES:
                continue
            on_integers = kind in _INTEGERS and all(map(_is_dequantized, _read_by(operation))) and _is_quantized(operation)
            (integer if on_integers else floats)[kind] += 1
            node = next((self._nodes[name] for name in (operation.name, operation.outputs[0].name) if name in self._nodes), None)
            layer = (node.meta.get("custom") or {}).get(self._layer_key, "") if node is not None else ""
            layers.append((kind, layer, on_integers))
            if kind in _PRODUCTS and on_integers and layer and node is not None and (fault := self._fault(operation, node)):
                faults[layer] = fault
        return {"integer": dict(integer), "floats": dict(floats), "conversions": conversions, "layers": layers, "faults": faults}

    def _fault(self, operation: Any, node: Any) -> str:
        """What the converted product has otherwise than the program's node; empty: nothing."""
        read, weight = node.args[0], node.args[1]
        one = _numbers(operation.inputs["x"])
        if one is None or not _near(one[0], read.args[1]) or int(one[1]) != int(read.args[2]):
            return f"what it reads has scale and zero point {one}, expected {(read.args[1], read.args[2])}"
        if "weight" in operation.inputs and getattr(weight.target, "__name__", "").startswith("dequantize"):
            stored = _constant(operation.inputs["weight"])
            wanted = [self._value(value) for value in weight.args]
            per_channel = "channel" in weight.target.__name__
            if stored is None or wanted[0] is None:
                return "its weight is no constant of integers"
            integers, scale, zero = stored
            if not _same_values(integers, np.asarray(wanted[0]), exactly=True):
                return "its weight has other integers"
            if not _same_values(scale, np.asarray(wanted[1]), exactly=False):
                return "its weight has other scales"
            if int(np.max(np.abs(zero.astype(int) - np.asarray(wanted[2]).astype(int)), initial=0)) != 0:
                return f"its weight has other zero points{' for some channels' if per_channel else ''}"
        behind = _behind(operation)
        made = [_numbers_of(reader) for reader in behind]
        after = _quantizes_behind(node)
        if after is not None and any(found is None or not _near(found[0], after[0]) or int(found[1]) != int(after[1]) for found in made):
            return f"its result is rounded to scale and zero point {made[0] if made else None}, expected {after}"
        return ""

    def _value(self, value: Any) -> Any:
        if not isinstance(value, torch.fx.Node):
            return value
        found = self._constants.get(value.name)
        return None if found is None else found.detach().cpu().numpy()


def _read_by(operation: Any) -> list[Any]:
    """The values that an operator computes with, without its parameters."""
    names = ("x", "y", "weight", "values")
    found: list[Any] = []
    for name in names:
        value = operation.inputs.get(name)
        found += list(value) if isinstance(value, (list, tuple)) else [value] if value is not None else []
    return found


def _is_dequantized(value: Any) -> bool:
    """Whether a value is what a conversion makes of integers, or a clamp after a product that reads such."""
    made = value.op
    if made is None:
        return False
    if made.op_type in ("dequantize", "constexpr_affine_dequantize", "constexpr_blockwise_shift_scale"):
        return True
    return made.op_type in (*_PRODUCTS, "add", "sub", "mul") and all(map(_is_dequantized, _read_by(made)))


def _is_quantized(operation: Any) -> bool:
    readers = operation.outputs[0].child_ops
    return bool(readers) and all(
        reader.op_type == "quantize" or (reader.op_type in _CLAMPS and _is_quantized(reader)) for reader in readers
    )


def _behind(operation: Any) -> list[Any]:
    """The quantize operators after one, past clamps."""
    found: list[Any] = []
    for reader in operation.outputs[0].child_ops:
        found += [reader] if reader.op_type == "quantize" else _behind(reader)
    return found


def _quantizes_behind(node: Any) -> tuple[float, int] | None:
    """Scale and zero point that a program's node is rounded to, past clamps, if that is one format."""
    found = set()
    for reader in node.users:
        if getattr(reader.target, "__name__", "").startswith("quantize_per_tensor"):
            found.add((float(reader.args[1]), int(reader.args[2])))
        elif (after := _quantizes_behind(reader)) is not None:
            found.add(after)
    return found.pop() if len(found) == 1 else None


def _numbers(value: Any) -> tuple[float, int] | None:
    return _numbers_of(value.op) if value.op is not None and value.op.op_type == "dequantize" else None


def _numbers_of(operation: Any) -> tuple[float, int] | None:
    """Scale, and zero point of int8: the converter takes uint8 where all integers lie above it."""
    from coremltools.converters.mil.mil import types

    scale, zero = operation.inputs["scale"].val, operation.inputs.get("zero_point")
    if scale is None:
        return None
    integers = operation.outputs[0] if operation.op_type == "quantize" else operation.inputs["input"]
    shift = 128 if types.builtin_to_string(integers.dtype) == "uint8" else 0
    return float(np.asarray(scale).reshape(-1)[0]), (int(np.asarray(zero.val).reshape(-1)[0]) if zero is not None else 0) - shift


def _constant(value: Any) -> tuple[Any, Any, Any] | None:
    """Integers, scales and zero points of a weight."""
    made = value.op
    if made is None or made.op_type not in ("constexpr_affine_dequantize", "dequantize"):
        return None
    name = "quantized_data" if made.op_type == "constexpr_affine_dequantize" else "input"
    zero = made.inputs.get("zero_point")
    arrays = [made.inputs[name].val, made.inputs["scale"].val, np.zeros((), np.int8) if zero is None else zero.val]
    if any(array is None for array in arrays):
        return None
    integers, scale, zeros = (np.asarray(array) for array in arrays)
    return integers, scale, zeros


def _same_values(one: Any, other: Any, exactly: bool) -> bool:
    """Whether two arrays are the same, where one may be the other's transpose."""
    forms = [other] + ([np.swapaxes(other, 0, 1)] if other.ndim > 1 else [])
    if exactly:
        return any(form.shape == one.shape and np.array_equal(form, one) for form in forms)
    return one.size == other.size and bool(np.all(np.abs(one.reshape(-1) - other.reshape(-1)) <= _TOLERANCE * np.abs(other.reshape(-1))))


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= _TOLERANCE * abs(other)
