"""Rewrites a traced program so that engines recognize its integer operators: dequantize, operator and quantize next to each other."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from lightning_cco.compat.decomposed import operators
from lightning_cco.graph.ops import OPS, Category

_SPELLED = (
    *("_unsafe_view", "alias", "clone", "constant_pad_nd", "contiguous", "im2col", "index", "t", "view"),
    *(f"{kind}_pad{number}d" for kind in ("reflection", "replication") for number in (1, 2, 3)),
    *(f"{kind}{number}d" for kind in ("upsample_nearest", "_upsample_nearest_exact") for number in (1, 2, 3)),
    *(f"{kind}max_pool{number}d{ending}" for kind, ending in (("adaptive_", ""), ("", "_with_indices")) for number in (1, 2, 3)),
)
_MOVES = {f"aten::{name}" for name in (*_SPELLED, *(name for name, op in OPS.items() if op.category is Category.PRESERVE))}
"""Operators whose results are values of their first argument, or 0: rounding them once more changes nothing. What torch's functions become in a trace."""
_CLAMPS = {"aten::relu", "aten::relu_", "aten::relu6", "aten::hardtanh", "aten::hardtanh_", "aten::clamp", "aten::clamp_"}
_TAKES_CLAMPS = {
    f"aten::{name}"
    for name in (
        *("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("linear", "addmm", "matmul", "mm", "bmm", "add", "sub", "mul"),
    )
}
"""Operators that engines take the clamp after them into, before they round."""
_INTEGERS = {
    f"aten::{name}"
    for name in (
        *("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "linear", "addmm", "matmul", "mm", "bmm"),
        *("add", "sub", "mul", "mean", "avg_pool2d", "adaptive_avg_pool2d", "cat", *(name.removeprefix("aten::") for name in _CLAMPS)),
    )
}
"""Operators that some engine computes on integers, if what they read is dequantized right before them."""


_DROPOUTS = ("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout")
_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def operator_of(node: Any) -> str:
    """``aten::conv2d`` of a call of ``torch.ops.aten.conv2d.default``; empty for what is no call of an operator."""
    if not isinstance(node, Node) or node.op != "call_function":
        return ""
    name = getattr(node.target, "name", None)
    return str(name()).partition(".")[0] if callable(name) else ""


class Passes:
    """The passes over one program, whose signature follows its graph.

    Args:
        program: The program; its graph is changed in place.
        joined: Whether what is concatenated is rounded as the result is.
    """

    def __init__(self, program: torch.export.ExportedProgram, joined: bool = True) -> None:
        self._joined = joined
        self.program, self.module, self.graph = program, program.graph_module, program.graph_module.graph
        found = operators()
        self._quantize, self._dequantize = found.quantize, found.dequantize

    def run(self) -> None:
        """All of them."""
        self.drop_copies()
        self.merge_clamps()
        self.carry_pairs()
        self.drop_free_clamps()
        if self._joined:
            self.join_formats()
        self.own_dequantize()
        self.graph.eliminate_dead_code()
        self.drop_unused()
        self.graph.lint()
        self.module.recompile()

    def drop_copies(self) -> None:
        """Take out what gives its argument (copies left by activations in place, clones, dropout in evaluation) and checks of types."""
        for node in list(self.graph.nodes):
            name = operator_of(node)
            if name == "aten::_assert_tensor_metadata":
                self.graph.erase_node(node)
            elif name == "aten::copy" and _alike(*node.args[:2]):
                self._replace(node, node.args[1])
            elif (name in _DROPOUTS and node.args[2] is False) or (
                name == "aten::clone" and node.kwargs.get("memory_format") in (None, torch.preserve_format)
            ):
                self._replace(node, node.args[0])

    def merge_clamps(self) -> None:
        """One clamp in the place of two, as ``hardtanh``: engines take one, of that name, into the operator before it."""
        for node in list(self.graph.nodes):
            inner, outer = _interval(node.args[0]) if node.args else None, _interval(node)
            if outer is None or math.isinf(outer[1]):
                continue
            before = node.args[0]
            if inner is None or len(before.users) > 1:
                inner, read = (-math.inf, math.inf), before
            else:
                read = before.args[0]
            low, high = (min(max(bound, outer[0]), outer[1]) for bound in inner)
            if math.isinf(low):
                continue
            node.target, node.args, node.kwargs = torch.ops.aten.hardtanh.default, (read, low, high), {}
            if read is not before:
                self.graph.erase_node(before)

    def carry_pairs(self) -> None:
        """Quantize and dequantize once more after what only moves values, where integers are read."""
        for node in list(self.graph.nodes):
            source = _moved_by(node)
            if not self._is_dequantized(source) or not isinstance(node.meta.get("val"), Tensor) or not self._serves_integers(node):
                continue
            readers = list(node.users)
            numbers = source.args[1:]
            with self.graph.inserting_after(node):
                levels = self._new(self._quantize, node, numbers)
            with self.graph.inserting_after(levels):
                values = self._new(self._dequantize, levels, numbers)
            for reader in readers:
                if reader.op != "output":
                    reader.replace_input_with(node, values)

    def drop_free_clamps(self) -> None:
        """Remove clamps whose bounds are the ends of the quantized range, because the quantizer clamps equally, if they would run as separate operators.

        That would be on floats; or on integers, of which ExecuTorch 1.5.1 takes those of the result for levels of the operand.
        """
        for node in list(self.graph.nodes):
            interval = _interval(node)
            if interval is None or operator_of(node.args[0]) in _TAKES_CLAMPS:
                continue
            if node.users and all(reader.target is self._quantize and _ends_within(reader, *interval) for reader in node.users):
                self._replace(node, node.args[0])

    def join_formats(self) -> None:
        """Round what is concatenated as the result is: engines join integers of one scale alone, and rounding before is the same as rounding after."""
        for node in list(self.graph.nodes):
            if operator_of(node) != "aten::cat" or not node.users:
                continue
            clamp = next(iter(node.users))
            between = clamp if operator_of(clamp) in _CLAMPS and len(node.users) == 1 else None
            readers = list(clamp.users) if between is not None else list(node.users)
            if (
                not readers
                or any(reader.target is not self._quantize for reader in readers)
                or len({reader.args[1:] for reader in readers}) > 1
            ):
                continue
            numbers, parts = readers[0].args[1:], []
            for part in node.args[0]:
                with self.graph.inserting_before(node):
                    limited = part if between is None else self._new(between.target, part, between.args[1:])
                    parts.append(self._new(self._dequantize, self._new(self._quantize, limited, numbers), numbers))
            node.args = (parts, *node.args[1:])
            if between is not None:
                self._replace(between, node)

    def own_dequantize(self) -> None:
        """One dequantize for each reader, which takes it into its operator."""
        for node in list(self.graph.nodes):
            if node.target is not self._dequantize:
                continue
            for reader in list(node.users)[1:]:
                with self.graph.inserting_before(reader):
                    twin = self.graph.call_function(self._dequantize, node.args, node.kwargs)
                twin.meta = dict(node.meta)
                if reader.op == "output":
                    continue  # its name is in the signature
                reader.replace_input_with(node, twin)

    def drop_unused(self) -> None:
        """Take out parameters, buffers and constants that nothing reads: the floats that integers have taken the place of."""
        signature, state = self.program.graph_signature, self.program.state_dict
        unused = {node.name: node for node in self.graph.nodes if node.op == "placeholder" and not node.users}
        kept, held = [], []
        for spec in signature.input_specs:
            if spec.arg.name in unused and spec.kind in _HELD:
                held.append(spec.target)
                self.graph.erase_node(unused[spec.arg.name])
            else:
                kept.append(spec)
        signature.input_specs[:] = kept
        needed = {spec.target for spec in kept}
        for name in held:
            if name not in needed:
                for values in (state, self.program.constants):
                    values.pop(name, None)

    def _serves_integers(self, node: Node) -> bool:
        """Whether something computes on integers with what a node gives."""
        return any(
            self._serves_integers(reader)
            if _moved_by(reader) is not None
            else operator_of(reader) in _INTEGERS and self._is_rounded(reader)
            for reader in node.users
        )

    def _is_rounded(self, node: Node) -> bool:
        """Whether all that reads a node rounds it, with a clamp between or without."""
        return bool(node.users) and all(
            reader.target is self._quantize or (operator_of(reader) in _CLAMPS and self._is_rounded(reader)) for reader in node.users
        )

    def _is_dequantized(self, node: Any) -> bool:
        return isinstance(node, Node) and node.target is self._dequantize

    def _new(self, operator: Any, node: Node, numbers: tuple[Any, ...]) -> Node:
        made: Node = self.graph.call_function(operator, (node, *numbers))
        value = node.meta["val"]
        with value.fake_mode:
            made.meta["val"] = operator(value, *numbers)
        made.meta |= {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
        return made

    def _replace(self, node: Node, other: Any) -> None:
        node.replace_all_uses_with(other)
        self.program.graph_signature.replace_all_uses(node.name, other.name)
        self.graph.erase_node(node)


def _moved_by(node: Node) -> Any:
    """The tensor whose values a node only moves, if need be through one of several results of an operator; None if it computes, or gives indices."""
    if node.target is not operator.getitem:
        return node.args[0] if operator_of(node) in _MOVES and node.args else None
    whole = node.args[0]
    indices = isinstance(whole, Node) and "max_pool" in operator_of(whole) and node.args[1] != 0
    return _moved_by(whole) if isinstance(whole, Node) and not indices else None


def _interval(node: Any) -> tuple[float, float] | None:
    """What a clamp by numbers clamps to."""
    name = operator_of(node)
    if name == "aten::relu":
        return 0.0, math.inf
    if name == "aten::relu6":
        return 0.0, 6.0
    if name not in ("aten::hardtanh", "aten::clamp"):
        return None
    bounds = list(node.args[1:3])
    if name == "aten::hardtanh":
        bounds = [*bounds, *(-1.0, 1.0)[len(bounds) :]]
    bounds = [*bounds, *[None] * (2 - len(bounds))]
    if node.kwargs or any(isinstance(bound, Node) for bound in bounds):
        return None
    low, high = bounds
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def _ends_within(quantize: Node, low: float, high: float) -> bool:
    """Whether the levels of a quantize operator end where an interval ends, or before."""
    numbers: list[Any] = list(quantize.args[1:5])
    scale, zero, first, last = numbers
    rounded = 0.499 * scale  # a limit is rounded to the level at the end
    return bool((first - zero) * scale >= low - rounded and (last - zero) * scale <= high + rounded)


def _alike(one: Any, other: Any) -> bool:
    """Whether two nodes give tensors of one shape and type."""
    values: list[Any] = [node.meta.get("val") if isinstance(node, Node) else None for node in (one, other)]
    return all(value is not None for value in values) and values[0].shape == values[1].shape and values[0].dtype == values[1].dtype
