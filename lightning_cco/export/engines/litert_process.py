"""LiteRT: programs in, ``.tflite`` files out, and runs of them. `engine_process` loads it; it imports nothing of lightning_cco."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import torch

_FAMILIES = {
    **dict.fromkeys(("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_3D", "conv1d", "conv2d", "conv3d", "convolution"), "conv"),
    **dict.fromkeys(("TRANSPOSE_CONV", "conv_transpose1d", "conv_transpose2d"), "transposed"),
    **dict.fromkeys(("FULLY_CONNECTED", "linear", "addmm"), "linear"),
}
"""Products of a program, and the operators that they become."""
_PRODUCTS = (*(name for name in _FAMILIES if name.isupper()), "BATCH_MATMUL")
_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")
_MOVES = (
    *(
        "RESHAPE",
        "TRANSPOSE",
        "SLICE",
        "STRIDED_SLICE",
        "SPLIT",
        "SPLIT_V",
        "PACK",
        "UNPACK",
        "PAD",
        "PADV2",
        "GATHER",
        "GATHER_ND",
        "CAST",
    ),
    *("SHAPE", "EXPAND_DIMS", "SQUEEZE", "BROADCAST_TO", "EMBEDDING_LOOKUP", "DELEGATE"),
)
_interpreters: dict[str, Any] = {}


def convert(source: str, target: str, layer_key: str) -> dict[str, Any]:
    """Convert a program, and write it.

    Returns:
        ``integer`` and ``floats``: how many operators of each kind compute on integers and on floats; ``conversions``: how many quantize or dequantize;
        ``layers``: operator, layer (empty: not known) and whether it computes on integers, of each product.
    """
    import litert_torch
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig

    program = torch.export.load(source)
    layers = _layers(program, layer_key)
    module = _constants_as_floats(program.module())
    # Nothing is quantized by it; without one the converter leaves all operators between their conversions, in float.
    static = PT2EQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=False))
    litert_torch.convert(module, tuple(program.example_inputs[0]), quant_config=QuantConfig(pt2e_quantizer=static)).export(target)
    return _computed(target, layers)


def run(path: str, arrays: list[Any]) -> list[Any]:
    """The outputs of a file, as floats where they are integers with a scale; so are inputs given. By the names of its signature: tensors can be shared."""
    runner = _loaded(path).get_signature_runner()
    given = {}
    for (name, entry), array in zip(_in_order(runner.get_input_details()), arrays, strict=True):
        scale, zero = entry["quantization"]
        if array.dtype.kind == "f" and entry["dtype"] is np.int8:
            array = np.clip(np.rint(array / np.float32(scale)) + zero, -128, 127)
        given[name] = np.ascontiguousarray(array.astype(entry["dtype"]))
    found, outputs = runner(**given), []
    for name, entry in _in_order(runner.get_output_details()):
        value, (scale, zero) = np.array(found[name]), entry["quantization"]
        outputs.append((value.astype(np.float32) - zero) * np.float32(scale) if entry["dtype"] is np.int8 and scale else value)
    return outputs


def formats(path: str) -> dict[str, Any]:
    """Inputs and outputs that are integers with a scale: name, scale, zero point."""
    runner = _loaded(path).get_signature_runner()
    found = [*_in_order(runner.get_input_details()), *_in_order(runner.get_output_details())]
    return {name: entry["quantization"] for name, entry in found if entry["dtype"] is np.int8}


def _loaded(path: str) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    if path not in _interpreters:
        _interpreters[path] = Interpreter(model_path=path, num_threads=1)
        _interpreters[path].allocate_tensors()
    return _interpreters[path]


def _in_order(details: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(details.items(), key=lambda entry: [int(number) for number in re.findall(r"\d+", entry[0])])


def _layers(program: Any, layer_key: str) -> dict[str, list[str]]:
    """The layers of a program's products, in order, by family."""
    found: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        name = str(getattr(node.target, "__name__", "")).partition(".")[0]
        if node.op == "call_function" and name in _FAMILIES:
            found.setdefault(_FAMILIES[name], []).append((node.meta.get("custom") or {}).get(layer_key, ""))
    return found


def _constants_as_floats(module: Any) -> Any:
    """Integer constants as floats that are quantized, then dequantized: what the converter knows of other tools."""
    operators = torch.ops.quantized_decomposed
    dequantize = {
        operators.dequantize_per_tensor.default: operators.quantize_per_tensor.default,
        operators.dequantize_per_channel.default: operators.quantize_per_channel.default,
    }
    for number, node in enumerate(list(module.graph.nodes)):
        if node.op != "call_function" or node.target not in dequantize or node.args[0].op != "get_attr":
            continue
        values = [_attribute(module, str(value.target)) if isinstance(value, torch.fx.Node) else value for value in node.args]
        name = f"floats_{number}"
        module.register_buffer(name, node.target(*values).detach())
        with module.graph.inserting_before(node):
            floats = module.graph.get_attr(name)
            node.replace_input_with(node.args[0], module.graph.call_function(dequantize[node.target], (floats, *node.args[1:])))
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _computed(path: str, layers: dict[str, list[str]]) -> dict[str, Any]:
    from ai_edge_litert import schema_py_generated as schema

    with open(path, "rb") as file:
        model = schema.ModelT.InitFromPackedBuf(file.read(), 0)
    kinds = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
    graph = model.subgraphs[0]
    integer: Counter[str] = Counter()
    floats: Counter[str] = Counter()
    products: list[tuple[str, bool]] = []
    conversions = 0
    for node in graph.operators:
        code = model.operatorCodes[node.opcodeIndex]
        name = kinds.get(max(code.builtinCode, code.deprecatedBuiltinCode), "CUSTOM")
        on_integers = all(graph.tensors[index].type == schema.TensorType.INT8 for index in node.outputs)
        conversions += name in _CONVERSIONS
        if name in _CONVERSIONS or name in _MOVES:
            continue
        (integer if on_integers else floats)[name] += 1
        if name in _PRODUCTS:
            products.append((name, on_integers))
    counts = Counter(_FAMILIES.get(name, name) for name, _ in products)
    known = {family: iter(names) for family, names in layers.items() if len(names) == counts[family]}
    named = [(name, next(known.get(_FAMILIES.get(name, name), iter(())), ""), on_integers) for name, on_integers in products]
    return {"integer": dict(integer), "floats": dict(floats), "conversions": conversions, "layers": named}
