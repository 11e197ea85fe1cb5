"""The values that each key of a recipe may have: bounds, words, and dataclasses that refuse others when they are constructed and when a field is set."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from lightning_cco.errors import CCOError
from lightning_cco.names import Interpolated, nearest, printable, shown

RANGE_ESTIMATORS = ("auto", "moving_average", "min_max", "percentile", "mse", "learned")
WEIGHT_ESTIMATORS = ("auto", "minmax", "mse", "learned")
RESIDUAL_STREAMS = ("auto", "quantized", "int8", "float")
FP16_FRAMEWORKS = ("tensorrt",)
"""Those whose files may have floats of 16 bits for what is not in INT8 (`Engine.takes_fp16`)."""
TARGET_FRAMEWORKS = ("ort", "openvino", "tensorrt", "executorch", "litert", "coreml", "qnn")
SENSITIVITY_MODES = ("local", "accumulated")
DISTILLED = ("outputs", "layers")
COMPARISONS = ("auto", "kl", "mse")
_ALIASES = {
    "ov": "openvino",
    "trt": "tensorrt",
    "onnxruntime": "ort",
    "et": "executorch",
    "xnnpack": "executorch",
    "tflite": "litert",
    "htp": "qnn",
}
GROUP_SIZES = (16, 32, 64, 128, 256)
"""How many weights can have a scale together: what engines multiply."""

# What a number may be, wherever it comes from: whether it is right, the words for it, and what to write instead.
BOUNDS: Mapping[str, tuple[Callable[[Any], bool], str, str]] = {
    "weights_num_bits": (lambda bits: 2 <= bits <= 8, "2 to 8 bits", "To leave a layer in float write skip_quantization: true."),
    "activations_num_bits": (lambda bits: 2 <= bits <= 8, "2 to 8 bits", "To leave a layer in float write skip_quantization: true."),
    "weights_group_size": (
        lambda size: size in (0, *GROUP_SIZES),
        "16, 32, 64, 128 or 256, or null",
        "Write 32.",
    ),
    "quantization_sensitivity_threshold": (lambda value: value >= 0, "a number of at least 0, or null", ""),
    "quantization_sensitivity_relative_threshold": (lambda value: value >= 0, "a number of at least 0, or null", ""),
    "loss_sensitivity_threshold": (lambda value: value >= 0, "a number of at least 0, or null", ""),
    "scale_learning_rate": (lambda rate: 0 < rate < float("inf"), "a number above 0", "Write 0.001."),
    "stats_steps": (lambda steps: 1 <= steps <= 10**6, "at least 1 calibration batch, and at most a million", "Write 20."),
    "averaging_constant": (lambda value: 0 < value <= 1, "a number in (0, 1]", "Write 0.05."),
    "percentile": (lambda value: 50 < value <= 100, "per cent in (50, 100]", "Write 99.99."),
    "freeze_ranges_at_step": (lambda step: step >= 0, "a step of at least 0, or null", ""),
    "weight": (lambda share: 0 <= share <= 1, "a number from 0 (no distillation) to 1 (nothing else)", "Write 0.7."),
    "temperature": (lambda value: 0 < value < float("inf"), "a number above 0", "Write 2."),
    "start_at_step": (lambda step: step >= 0, "a step of at least 0, or null", ""),
    "at_step": (lambda step: step >= 0, "a step of at least 0", ""),
    "at_epoch": (lambda epoch: epoch >= 0, "an epoch of at least 0", ""),
    "freeze_batch_norm_at_step": (lambda step: step >= 0, "a step of at least 0, or null", ""),
    "size": (lambda part: 0 < part <= 1, "a part of the float file in (0, 1], or null", "Write 0.2."),
    "average_bits": (lambda bits: 2 <= bits <= 32, "2 to 32 bits per weight, or null", "Write 4."),
    "bops": (lambda part: 0 < part <= 1, "a part of the float model's operations in (0, 1], or null", "Write 0.1."),
    "speed": (lambda times: 0 < times <= 1000, "a multiple of the float model's speed in (0, 1000], or null", "Write 2."),
    "threads": (lambda count: 1 <= count <= 1024, "1 to 1024 threads", "Write 1."),
    "batch_size": (lambda count: 1 <= count <= 10**6, "1 to a million samples", "Write 1."),
    "accuracy_drop": (lambda drop: 0 <= drop < float("inf"), "a number of at least 0, or null", "Write 0.005."),
    "revise_every_n_epochs": (lambda count: 1 <= count <= 10**6, "at least 1, or null", "Write 5."),
    "sensitivity_batches": (lambda count: 1 <= count <= 10**6, "at least 1, and at most a million", "Write 2."),
}

CHOICES: Mapping[str, Sequence[str]] = {
    "range_estimator": RANGE_ESTIMATORS,
    "weight_estimator": WEIGHT_ESTIMATORS,
    "residual_stream": RESIDUAL_STREAMS,
    "on": DISTILLED,
    "loss": COMPARISONS,
    "sensitivity_modes": SENSITIVITY_MODES,
    "target_framework": TARGET_FRAMEWORKS,
    "by": ("", "budget"),
    "accuracy_drop_by": ("size", "speed"),
    "automatic_skip_by": ("qs", "loss"),
}
"""The words that a setting may be, or a list of."""


def problem_with(key: str, value: object) -> str:
    """What is wrong with the value of a setting, in words; empty if nothing is. Of its type it is already."""
    if key in BOUNDS and isinstance(value, (int, float)) and not isinstance(value, bool):
        right, expected, instead = BOUNDS[key]
        return "" if right(value) else f"expected {expected}, got {shown(value)}. {instead}".rstrip()
    if key in CHOICES and isinstance(value, str):
        return _not_one_of(CHOICES[key], value, target_of(value) if key == "target_framework" else value)
    if key in CHOICES and isinstance(value, list):
        if not value:
            return f"expected at least one of {list(CHOICES[key])}, got none."
        return next((problem for word in value if isinstance(word, str) and (problem := _not_one_of(CHOICES[key], word, word))), "")
    if key in ("output_dir", "export_dir", "teacher", "layer_times") and isinstance(value, str) and "\0" in value:
        return f"expected the path of a {'folder' if key.endswith('_dir') else 'file'}, got {shown(value)}."
    return ""


def _not_one_of(allowed: Sequence[str], written: str, meant: str) -> str:
    return "" if meant in allowed else f"expected one of {list(allowed)}, got {shown(written)}.{nearest(written, allowed)}"


def target_of(name: str) -> str:
    return _ALIASES.get(name.lower(), name.lower())


def _boolean(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):  # from an environment variable, say
        return value.lower() == "true"
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, float, str)):
        raise TypeError
    whole = int(value)
    if not isinstance(value, str) and whole != value:
        raise ValueError
    return whole


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, str)):  # text: YAML reads 1e4 as one
        raise TypeError
    return float(value)


def _text(value: Any) -> str:
    if isinstance(value, (str, Path)):
        return value if isinstance(value, Interpolated) else str(value)
    raise TypeError


def _texts(value: Any) -> list[str]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, (Sequence, Set)):
        raise TypeError
    return [_text(item) for item in value]


def _stages(value: Any) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise TypeError
    if not all(isinstance(item, (Checked, Mapping)) for item in value):
        raise TypeError
    return list(value)


STAGES = "list[BitsStage]"
_CONVERT: Mapping[str, Callable[[Any], Any]] = {
    "bool": _boolean,
    "int": _integer,
    "float": _float,
    "str": _text,
    "list[str]": _texts,
    STAGES: _stages,
}
_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list[str]": "a list of names",
    STAGES: "a list of stages, such as [{at_step: 500, weights_num_bits: 4}],",
}


def converted(value: Any, kind: str) -> Any:
    """A value as the type that its setting has.

    Args:
        value: The value.
        kind: The setting's annotation, such as ``int | None``.

    Raises:
        TypeError: It is of another type. Also ValueError and OverflowError.

    >>> converted("8", "int | None"), converted(None, "int | None")
    (8, None)
    """
    return None if value is None and kind.endswith("| None") else _CONVERT[kind.removesuffix(" | None")](value)


def not_of_type(value: Any, kind: str) -> str:
    """What is wrong with a value that `converted` refuses, in words."""
    words = _WORDS[kind.removesuffix(" | None")] + (" or null" if kind.endswith("| None") else "")
    came = "str" if isinstance(value, str) else type(value).__name__
    return f"expected {words}, got {came}: {shown(value)}.{_instead(value, kind)}"


def _instead(value: Any, kind: str) -> str:
    """What to write instead of a value that YAML, or whoever wrote it, has made something else of; empty if nobody knows."""
    if isinstance(value, Interpolated):
        return ""  # what it stands for is not shown
    if kind.startswith("int") and isinstance(value, str):
        try:
            number = float(value.replace(",", ""))
        except ValueError:
            return ""
        return f" Write {int(number)}." if number.is_integer() and abs(number) < 2**53 else ""
    if kind.startswith(("str", "list[str]")):
        values = value if isinstance(value, list) else [value]
        if any(isinstance(one, bool) for one in values):
            return " YAML reads yes, no, on and off as true and false: write a name in quotes."
        if any(isinstance(one, (int, float)) for one in values):
            return " Write a name in quotes."
    return ""


class Checked:
    """Refuses a value that can't be where it is written: in the constructor and in an assignment. Converts what says the same in another type."""

    def __setattr__(self, key: str, value: object) -> None:
        fields = type(self).__dataclass_fields__  # type: ignore[attr-defined]
        if key not in fields:
            raise CCOError(f"{type(self).__name__}.{printable(key, 80)}: there is no such setting.{nearest(key, list(fields))}")
        try:
            value = converted(value, fields[key].type)
        except (TypeError, ValueError, OverflowError) as error:
            raise CCOError(f"{type(self).__name__}.{key}: {not_of_type(value, fields[key].type)}") from error
        if problem := problem_with(key, value):
            raise CCOError(f"{type(self).__name__}.{key}: {problem}")
        super().__setattr__(key, value)
