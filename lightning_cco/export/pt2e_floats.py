"""Types of floats in a program with quantized operators: what a model computes in 16 bits is computed in float32, as in an ONNX file (`float_types`).

Engines look for a dequantize operator right before an operator and for a quantize operator right after it; a cast between them breaks this pattern.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node, map_arg

from lightning_cco.export.pt2e_passes import operator_of

_NARROW = (torch.float16, torch.bfloat16)


def compute_in_float32(program: torch.export.ExportedProgram) -> tuple[torch.export.ExportedProgram, list[str]]:
    """Take 16-bit floats out of a program, but for its inputs and outputs, and doubles where it only converts to them and back.

    Args:
        program: Without operators in place; changed.

    Returns:
        The program, and the names of the types that were taken out.
    """
    graph = program.graph_module.graph
    _drop_round_trips(graph)
    found = {dtype for node in graph.nodes if node.op == "call_function" and (dtype := _dtype(node)) in _NARROW}
    if not found:
        return program, []
    _widen_constants(program)
    _keep_outputs(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and not node.meta.get("leaves"):
            _widen(node)
    for node in list(graph.nodes):
        if operator_of(node) == "aten::_assert_tensor_metadata":
            graph.erase_node(node)
        elif _only_casts(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    program.graph_module.recompile()
    return program.run_decompositions({}), sorted(str(dtype).removeprefix("torch.") for dtype in found)


def _drop_round_trips(graph: torch.fx.Graph) -> None:
    """Take out conversions from float32 to double and back."""
    for back in list(graph.nodes):
        there: Any = back.args[0] if back.args else None
        if _casts_to(back, torch.float32) and _casts_to(there, torch.float64) and _dtype(there.args[0]) is torch.float32:
            back.replace_all_uses_with(there.args[0])
            graph.erase_node(back)
            if not there.users:
                graph.erase_node(there)


def _casts_to(node: Any, dtype: torch.dtype) -> bool:
    return operator_of(node) in ("aten::_to_copy", "aten::to") and node.kwargs == {"dtype": dtype}


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None


def _widen_constants(program: torch.export.ExportedProgram) -> None:
    """Constants and inputs as float32."""
    targets = {
        entry.arg.name: entry.target
        for entry in program.graph_signature.input_specs
        if entry.target is not None and hasattr(entry.arg, "name")
    }
    graph = program.graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        if _dtype(node) not in _NARROW:
            continue
        target = targets.get(node.name)
        held = next((values for values in (program.constants, program.state_dict) if target in values), None)
        if held is not None and target is not None:
            held[target] = held[target].to(torch.float32)
            node.meta["val"] = node.meta["val"].to(torch.float32)
            continue
        with graph.inserting_before(placeholders[-1].next):
            cast = graph.call_function(torch.ops.aten.to.dtype, (node, torch.float32))
        cast.meta["leaves"] = True
        node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)


def _keep_outputs(graph: torch.fx.Graph) -> None:
    """Give outputs of 16 bits their type where they leave."""
    output = next(node for node in graph.nodes if node.op == "output")

    def leaving(value: Node) -> Node:
        if _dtype(value) not in _NARROW:
            return value
        with graph.inserting_before(output):
            cast = graph.call_function(torch.ops.aten.to.dtype, (value, _dtype(value)))
        cast.meta["leaves"] = True
        return cast

    output.args = map_arg(output.args, leaving)


def _widen(node: Node) -> None:
    """Let a call make float32 of what it converts to."""
    wide: dict[Any, Any] = dict.fromkeys(_NARROW, torch.float32)
    node.args = tuple(wide.get(arg, arg) if isinstance(arg, torch.dtype) else arg for arg in node.args)
    node.kwargs = {name: wide.get(arg, arg) if isinstance(arg, torch.dtype) else arg for name, arg in node.kwargs.items()}


def _only_casts(node: Node) -> bool:
    """Whether it makes float32 of what is float32 by now."""
    return _casts_to(node, torch.float32) and not node.meta.get("leaves") and _dtype(node.args[0]) in (*_NARROW, torch.float32)
