"""ExecuTorch with XNNPACK: programs in, ``.pte`` files out, and runs of them. `engine_process` loads it; it imports nothing of lightning_cco."""

from __future__ import annotations

from typing import Any

import torch

_QUANTIZE, _DEQUANTIZE = "quantize_per_tensor", "dequantize_per_tensor"
_CLAMPS = ("relu", "hardtanh", "clamp")
_PRODUCTS = ("convolution", "linear", "addmm", "mm", "bmm")
_MOVES = (
    *(
        "view_copy",
        "permute_copy",
        "slice_copy",
        "select_copy",
        "unsqueeze_copy",
        "squeeze_copy",
        "expand_copy",
        "split_with_sizes_copy",
        "alias_copy",
    ),
    *("_to_dim_order_copy", "_clone_dim_order", "clone", "getitem", "sym_size", "constant_pad_nd", "full", "full_like", "t_copy"),
)
_INTEGERS = (*_PRODUCTS, *_CLAMPS, "add", "sub", "mul", "mean", "elu", "cat", "max_pool2d")
"""Operators that XNNPACK computes on integers where they stand between dequantize and quantize operators; others run on floats between conversions."""
_methods: dict[str, Any] = {}


def convert(source: str, target: str, layer_key: str) -> dict[str, Any]:
    """Lower a program, and write it.

    Returns:
        ``nodes``: operator, whether XNNPACK has it, whether it computes on integers, and its layer, of each that computes;
        ``parts``: how many parts XNNPACK has; ``conversions``: how many operators quantize or dequantize between others.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.lowered_backend_module import LoweredBackendModule

    edge = to_edge_transform_and_lower(torch.export.load(source), partitioner=[XnnpackPartitioner()])
    whole = edge.exported_program().graph_module
    nodes, conversions = _nodes(whole.graph, False, layer_key)
    parts = [part for _, part in whole.named_children() if isinstance(part, LoweredBackendModule)]
    for part in parts:
        more, between = _nodes(part.original_module.graph, True, layer_key)
        nodes += more
        conversions += between
    with open(target, "wb") as file:
        file.write(edge.to_executorch().buffer)
    return {"nodes": nodes, "parts": len(parts), "conversions": conversions}


def run(path: str, arrays: list[Any]) -> list[Any]:
    """The outputs of a file."""
    from executorch.runtime import Runtime, Verification

    if path not in _methods:
        program = Runtime.get().load_program(path, verification=Verification.Minimal)
        _methods[path] = (program, program.load_method("forward"))
    outputs = _methods[path][1].execute([torch.from_numpy(array) for array in arrays])
    return [output.clone().numpy() if isinstance(output, torch.Tensor) else output for output in outputs]


def _nodes(graph: Any, delegated: bool, layer_key: str) -> tuple[list[tuple[str, bool, bool, str]], int]:
    found, conversions = [], 0
    for node in graph.nodes:
        name = _operator(node)
        if name in (_QUANTIZE, _DEQUANTIZE):
            others = node.all_input_nodes if name == _QUANTIZE else list(node.users)
            conversions += not all(_operator(other) and (_on_integers(other) or _operator(other) in _MOVES) for other in others)
        elif name and name not in _MOVES and name not in ("executorch_call_delegate", "dequantize_per_channel"):
            layer = (node.meta.get("custom") or {}).get(layer_key, "")
            found.append((name, delegated, delegated and _on_integers(node), layer))
    return found, conversions


def _operator(node: Any) -> str:
    if node.op != "call_function":
        return ""
    parts = str(getattr(node.target, "__name__", node.target)).split(".")  # aten.linear.default, sym_size.int, getitem
    return parts[-2] if len(parts) > 1 else parts[0]


def _on_integers(node: Any) -> bool:
    """Whether all that an operator reads is dequantized, and all that reads it quantizes, with a clamp between or without."""
    if _operator(node) not in _INTEGERS:
        return False
    read = [
        other for other in node.all_input_nodes if other.op == "call_function" and not _operator(other).startswith("dequantize_per_channel")
    ]
    if _operator(node) in _CLAMPS and read and _operator(read[0]) in (*_PRODUCTS, "add", "mul", "sub"):
        return _on_integers(read[0])
    return bool(read) and all(_operator(other) == _DEQUANTIZE for other in read) and _is_quantized(node)


def _is_quantized(node: Any) -> bool:
    return bool(node.users) and all(
        _operator(user) == _QUANTIZE or (_operator(user) in _CLAMPS and _is_quantized(user)) for user in node.users
    )
