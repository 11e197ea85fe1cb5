"""What a saved state of a quantized model holds; checked as a whole before any of it is applied."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_cco.errors import CCOError
from lightning_cco.quantization.qparams import affine_qparams

STATE_VERSION = 3
"""Since version 2 every key is there, also one that says nothing: of a key that is not, nobody could tell whether it was lost. Version 3 adds ``outliers``."""
_NUMBERS = ("min_val", "max_val", "scale", "zero_point", "clip_ratio")
_MOST_VALUES = 2**30
_WAY_OUT = "Load another checkpoint, or only the weights of this one, and calibrate anew."


def refuse(key: str, expected: str, got: Any) -> NoReturn:
    """Raise the error that names a key of a state."""
    shown = type(got).__name__ if not isinstance(got, (int, float, str, bool)) else repr(got)[:80]
    raise CCOError(
        f"load_state_dict: the checkpoint's state is damaged: '{key}': expected {expected}, got {shown}. Nothing was applied. {_WAY_OUT}"
    )


def entry(state: Mapping[str, Any], key: str, kind: type | tuple[type, ...], path: str = "") -> Any:
    """The value of a key, of the type that it must have.

    Raises:
        CCOError: It is missing or of another type.
    """
    name = kind.__name__ if isinstance(kind, type) else " or ".join(one.__name__ for one in kind)
    if key not in state:
        raise CCOError(f"load_state_dict: the checkpoint's state lacks '{path}{key}' ({name}). Nothing was applied. {_WAY_OUT}")
    if not isinstance(state[key], kind) or (kind is int and isinstance(state[key], bool)):
        refuse(path + key, f"a {name}", state[key])
    return state[key]


def names(state: Mapping[str, Any], key: str, path: str = "") -> list[str]:
    """The list of strings of a key."""
    values: list[str] = list(entry(state, key, (list, tuple), path))
    for value in values:
        if not isinstance(value, str):
            refuse(path + key, "names of layers", value)
    return values


def check_state(state: Any) -> None:
    """Check a state of `QuantizedModel`.

    Raises:
        CCOError: It is of a newer version, or some value of it can't be; the message names the key.
    """
    if not isinstance(state, Mapping):
        refuse("quantized", "a mapping", state)
    version = entry(state, "version", int, "quantized.")
    if version > STATE_VERSION:
        raise CCOError(
            f"load_state_dict: the checkpoint's state is of version {version}; this lightning_cco reads versions up to {STATE_VERSION}. "
            "Update lightning_cco, or load only the weights and calibrate anew."
        )
    if version < 1:
        refuse("quantized.version", f"1 to {STATE_VERSION}", version)
    kinds = entry(state, "kinds", Mapping, "quantized.")
    for name, kind in kinds.items():
        if not isinstance(name, str) or not isinstance(kind, str):
            refuse("quantized.kinds", "the kind of each layer by name", kind)
    names(state, "quantized", "quantized.")
    later: dict[str, Any] = {key: {} for key in ("inputs", "weight_scales", "bias_corrections") if version < 2 and key not in state}
    for key in ("layers", "suggestions"):
        if version >= 2 or key in state:
            names(state, key, "quantized.")
    if version >= 3 or "outliers" in state:
        names(state, "outliers", "quantized.")
    _check_inputs(entry({**later, **state}, "inputs", Mapping, "quantized."))
    entry(state, "calibrated", bool, "quantized.")
    entry(state, "frozen", bool, "quantized.")
    for name, ranges in entry(state, "ranges", Mapping, "quantized.").items():
        path = f"quantized.ranges.{name}"
        if not isinstance(ranges, Mapping):
            refuse(path, "a mapping", ranges)
        if version >= 2:
            entry(ranges, "settled", object, path + ".")
        _check_ranges(ranges, path + ".")
    for name, scales in entry({**later, **state}, "weight_scales", Mapping, "quantized.").items():
        _check_weight_scales(scales, f"quantized.weight_scales.{name}")
    _check_corrections(entry({**later, **state}, "bias_corrections", Mapping, "quantized."), "quantized.bias_corrections")


def _holds_floats(tensor: Tensor) -> bool:
    """Floating-point numbers that are there: a tensor on ``meta`` has none."""
    return tensor.is_floating_point() and not tensor.is_meta and tensor.layout is torch.strided


def _check_corrections(corrections: Mapping[str, Any], path: str) -> None:
    """Check what is added to the bias of each layer."""
    for name, value in corrections.items():
        if not isinstance(value, Tensor) or value.dim() != 1 or not _holds_floats(value) or not torch.isfinite(value).all():
            refuse(f"{path}.{name}", "finite numbers, one for each channel", str(getattr(value, "shape", value)))


def _check_weight_scales(scales: Any, path: str) -> None:
    """Check the learned scales of a layer's weights."""
    if not isinstance(scales, (list, tuple)):
        refuse(path, "a list", scales)
    for number, one in enumerate(scales):
        if not isinstance(one, Mapping):
            refuse(f"{path}[{number}]", "a mapping", one)
        for key in ("scales", "velocity") if one else ():
            tensor = entry(one, key, Tensor, f"{path}[{number}].")
            if not _holds_floats(tensor) or not torch.isfinite(tensor).all() or tensor.shape != one["scales"].shape:
                refuse(f"{path}[{number}].{key}", "finite numbers, one for each channel", f"{tensor.dtype} of shape {tuple(tensor.shape)}")
            if key == "scales" and not (tensor > 0).all():
                refuse(f"{path}[{number}].{key}", "numbers above 0", float(tensor.min()))


def _check_inputs(inputs: Any) -> None:
    """Check shapes and types of the model's inputs, which examples are made of."""
    if not isinstance(inputs, Mapping):
        refuse("quantized.inputs", "a mapping", inputs)
    for name, given in inputs.items():
        shape, dtype = (given.get("shape"), given.get("dtype")) if isinstance(given, Mapping) else (None, None)
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape) or math.prod(shape) > _MOST_VALUES:
            refuse(f"quantized.inputs.{name}.shape", f"a list of sizes, of {_MOST_VALUES} values at most", str(shape))
        if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
            refuse(f"quantized.inputs.{name}.dtype", "the name of a torch.dtype", str(dtype))


def _check_ranges(ranges: Mapping[str, Any], path: str) -> None:
    bits = entry(ranges, "num_bits", int, path)
    if not 2 <= bits <= 8:
        refuse(path + "num_bits", "2 to 8", bits)
    if not isinstance(ranges.get("settled", False), bool):  # older states have none
        refuse(path + "settled", "true or false", ranges["settled"])
    value = {}
    for key in _NUMBERS:
        tensor = entry(ranges, key, Tensor, path)
        if tensor.shape != () or not _holds_floats(tensor):
            refuse(
                path + key,
                "a floating-point tensor without dimensions",
                f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}",
            )
        value[key] = float(tensor)
        if not torch.isfinite(tensor):
            refuse(path + key, "a finite number", value[key])
    if value["min_val"] > value["max_val"]:
        refuse(path + "min_val", f"at most max_val, {value['max_val']:g}", value["min_val"])
    for key in ("scale", "clip_ratio"):
        if value[key] <= 0:
            refuse(path + key, "a number above 0", value[key])
    learned = ranges.get("learned", torch.zeros(3))
    if not isinstance(learned, Tensor) or learned.shape != (3,) or not _holds_floats(learned) or not torch.isfinite(learned).all():
        refuse(path + "learned", "three finite numbers", str(getattr(learned, "shape", learned)))
    low, high = -(2 ** (bits - 1)), 2**bits - 1
    if value["zero_point"] != round(value["zero_point"]) or not low <= value["zero_point"] <= high:
        refuse(path + "zero_point", f"a whole number from {low} to {high}", value["zero_point"])


def check_scale(ranges: Mapping[str, Any], name: str, symmetric: bool) -> None:
    """Check that a scale and its zero point are those that follow from their range.

    Raises:
        CCOError: One is another.
    """
    numbers = {key: float(ranges[key]) for key in _NUMBERS}
    if numbers["min_val"] == numbers["max_val"] == numbers["zero_point"] == 0 and numbers["scale"] == 1:
        return  # what a quantizer begins with: it has seen nothing yet
    scale, zero_point = affine_qparams(ranges["min_val"].float(), ranges["max_val"].float(), ranges["num_bits"], symmetric)
    if abs(float(ranges["scale"]) / float(scale) - 1) > 0.01:
        refuse(f"quantized.ranges.{name}.scale", f"{float(scale):g}, which follows from min_val and max_val", float(ranges["scale"]))
    if abs(float(ranges["zero_point"]) - float(zero_point)) > 1:
        refuse(
            f"quantized.ranges.{name}.zero_point",
            f"{float(zero_point):g}, which follows from min_val and max_val",
            float(ranges["zero_point"]),
        )
