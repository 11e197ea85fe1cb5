"""Sessions of ONNX Runtime, and what a file says of its rounded tensors."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class QuantizeNode:
    """A QuantizeLinear of a file.

    Attributes:
        tensor: Name of the integers that it makes, narrowed to fewer than 8 bits.
        scale, zero_point: Its format as the file has it.
    """

    tensor: str
    scale: float
    zero_point: int


_MOST_BYTES = 1_900_000_000
"""More than a file in one piece may have."""
FLOAT_PRODUCTS = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""What keeps ONNX Runtime from rounding what products with weights alone in integers read."""


def engine_session(model: Any, as_written: bool = False, entries: Mapping[str, str] | None = None, **options: Any) -> Any:
    """A session as a user makes it; or one without fusion, which computes each operator of the file in float between dequantize and quantize.

    Args:
        model: Path of a file.
        as_written: Whether it is the latter.
        entries: Entries of the session's configuration.
        **options: Attributes of its options.
    """
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # errors are raised as well, with the same words
    if as_written:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for name, value in (entries or {}).items():
        settings.add_session_config_entry(name, value)
    for name, value in options.items():
        setattr(settings, name, value)
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def constants(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Every initializer of a loaded file by name."""
    import onnx

    return {entry.name: onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer}


def operand_name(layer: str, number: int) -> str:
    """The quantizer, in a file, of a layer's constant operand that is computed there: ``concat.operand``, the second one ``concat.operand_2``."""
    return f"{layer}.operand_{number + 1}" if number else f"{layer}.operand"


def rounded_tensors(model: Any, keys: Iterable[str]) -> dict[str, list[QuantizeNode]]:
    """The quantize nodes of each quantizer, in the order of the file: what several layers read is rounded for each of them."""
    import onnx

    values = {entry.name: entry for entry in model.graph.initializer}
    made = _quantize_nodes(model, values)
    found: dict[str, list[QuantizeNode]] = {}
    for key in dict.fromkeys(keys):
        names = [f"{key}_quantized"]
        while f"{key}.{len(names) + 1}_quantized" in made:
            names.append(f"{key}.{len(names) + 1}_quantized")
        for name in names:
            if name in made:
                scale, zero_point = (onnx.numpy_helper.to_array(values[entry]) for entry in made[name].input[1:3])
                found.setdefault(key, []).append(QuantizeNode(name, float(scale.reshape(())), int(zero_point.reshape(()))))
    return found


def _quantize_nodes(model: Any, known: Container[str]) -> dict[str, Any]:
    """The QuantizeLinear after each tensor of integers, seen through the Clip that narrows a format of fewer than 8 bits."""
    made = {node.output[0]: node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[2] in known}
    clipped = {node.output[0]: made[node.input[0]] for node in model.graph.node if node.op_type == "Clip" and node.input[0] in made}
    return made | clipped


def inspected_session(
    path: Path, model: Any, tensors: Iterable[str], as_written: bool, rounding: Container[str] = (), copies: Mapping[str, str] | None = None
) -> Any:
    """A session of a file that gives some of its integer tensors as further outputs; what the plan does not round is not rounded in it.

    Args:
        path: The file.
        model: The same, loaded.
        tensors: What it gives as well.
        as_written: Whether each operator is computed without fusion.
        rounding: Names of nodes that round what they read, as planned.
        copies: Names of floats among ``tensors``, and of which tensors they are copies.
    """
    import onnx

    types = {entry.name: entry.data_type for entry in model.graph.initializer}
    made = {name: types[node.input[2]] for name, node in _quantize_nodes(model, types).items()}
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    copies = copies or {}
    whole.graph.node.extend(onnx.helper.make_node("Identity", [source], [name]) for name, source in copies.items())
    for name in tensors:
        kind = onnx.TensorProto.FLOAT if name in copies else made[name]
        whole.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    for node in whole.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level" and node.name not in rounding:  # of a product in the engine's own form
                attribute.i = int(FLOAT_PRODUCTS["session.qdq_matmulnbits_accuracy_level"])
    return session_of(whole, path.with_name("inspected.onnx"), as_written)


def session_of(model: Any, path: Path, as_written: bool) -> Any:
    """A session of a changed model, which is written to the folder of its file, and quantizes nothing that the plan does not."""
    import onnx

    onnx.save(model, str(path), save_as_external_data=model.ByteSize() > _MOST_BYTES)
    return engine_session(str(path), as_written, FLOAT_PRODUCTS)
