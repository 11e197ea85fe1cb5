"""Which arguments of `torch.onnx.export` an export takes, and why it takes no others."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from lightning_cco.export.errors import ExportError

HONOURED = (
    "opset_version",
    "input_names",
    "output_names",
    "dynamic_axes",
    "dynamic_shapes",
    "verbose",
    "external_data",
    "optimize",
    "custom_translation_table",
)
OPSETS = (17, 18, 19, 20, 21, 22, 23)
_OWN = (
    "example_args",
    "example_kwargs",
    "batches",
    "dynamic_batch",
    "check",
    "min_sqnr_db",
    "max_mean_steps",
    "int4",
    "fp16",
    "dynamic_sizes",
)
_REFUSED: Mapping[str, str] = {
    "f": "the path is export's first argument",
    "model": "the model is the quantized one",
    "args": "write example_args=(...)",
    "kwargs": "write example_kwargs={...}",
    "report": "export makes a report of its own, which it returns",
    "verify": "export checks the file by itself; write check=True or check=False",
    "profile": "it measures the exporter, not the file",
    "dump_exported_program": "export to a path that ends in .pt2 for the program",
    "artifacts_dir": "no further files are written",
    "custom_opsets": "the exporter that is used takes custom_translation_table instead",
}
"""Arguments that do nothing here, whatever their value, and what to write instead."""
_FIXED: Mapping[str, tuple[tuple[str, ...], str]] = {
    "dynamo": (("True",), "the TorchScript exporter can't write quantize operators where the plan has them"),
    "fallback": (("False",), "the exporter's other tracers would write a float model"),
    "export_params": (("True",), "a file without its INT8 weights is not compressed"),
    "keep_initializers_as_inputs": (("False",), "weights that a caller may replace are no constants, so that engines compute in float"),
    "do_constant_folding": (("True",), "write optimize=False for a graph that is not optimized"),
    "training": (("TrainingMode.EVAL", "None"), "a file holds the forward in evaluation mode"),
    "operator_export_type": (("OperatorExportTypes.ONNX",), "operators that ONNX lacks go into custom_translation_table"),
    "operator_export_types": (("OperatorExportTypes.ONNX",), "operators that ONNX lacks go into custom_translation_table"),
    "export_modules_as_functions": (("False",), "quantize operators must be next to the layers that they belong to"),
    "autograd_inlining": (("True",), "custom autograd functions are always written by what they compute"),
}
"""Arguments with one value that is what happens anyway, and why no other is possible."""


def checked_options(options: Mapping[str, Any], int4: bool, symmetric: bool) -> dict[str, Any]:
    """The options that an export acts on.

    Args:
        options: What the user gave, by the names of `torch.onnx.export`.
        int4: Whether weights are to be stored in 4 bits, or in groups with a scale each.
        symmetric: Whether activations are symmetric.

    Raises:
        CCOError: An option can't be honoured; it is named with what to write instead.
    """
    taken: dict[str, Any] = {}
    for name, value in options.items():
        if name in HONOURED:
            taken[name] = value
        elif name in _REFUSED:
            raise ExportError(f"the option {name}={_short(value)} of torch.onnx.export is not taken: {_REFUSED[name]}. Leave it out.")
        elif name in _FIXED:
            allowed, reason = _FIXED[name]
            if str(value) not in allowed:
                raise ExportError(f"{name}={_short(value)} is not possible, only {name}={allowed[0]}: {reason}. Leave it out.")
        else:
            known = [*_OWN, *HONOURED]
            near = difflib.get_close_matches(name, known, 1)
            raise ExportError(f"unknown option '{name}'.{f' Did you mean {near[0]}?' if near else ''} Known ones: {', '.join(known)}.")
    opset = taken.get("opset_version")
    possible = [number for number in OPSETS if (number >= 21 or not int4) and (number < 21 or not symmetric or int4)]
    if opset is not None and opset not in possible:
        what = " with weights in 4 bits or in groups" if int4 else " with symmetric activations" if symmetric else ""
        raise ExportError(
            f"opset_version={_short(opset)} can't be written{what}. Expected one of {possible}: below 17 there is no layer normalization, from 21 on "
            "there are 4-bit integers and blocks of them, but ONNX Runtime 1.32 refuses its own rewriting of symmetric int8 pairs."
        )
    for name in ("input_names", "output_names"):
        names = taken.get(name)
        if names is not None and (isinstance(names, str) or not all(isinstance(entry, str) and entry for entry in names)):
            raise ExportError(f"{name} expects a list of names, got {_short(names)}.")
        if names is not None and len(set(names)) != len(list(names)):
            raise ExportError(f"{name} expects different names, got {_short(names)}.")
    if taken.get("dynamic_axes") is not None and taken.get("dynamic_shapes") is not None:
        raise ExportError("dynamic_axes and dynamic_shapes say the same thing. Give one of them.")
    return {name: value for name, value in taken.items() if value is not None}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
