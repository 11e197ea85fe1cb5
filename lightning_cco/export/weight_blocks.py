"""Weights with a scale for each group of inputs, as files hold them: blocks of integers for a product, or for a table that rows are looked up in."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_cco.export.fold_batch_norm import IntegerWeight
from lightning_cco.export.onnx_passes import constant, initializer, within_bits

Write = Callable[..., Tensor]
"""Writes an operator: its name, inputs, shape and type of the result, attributes."""
DOMAIN = "com.microsoft"
PRODUCT, LOOKUP = "MatMulNBits", "GatherBlockQuantized"
_ROUNDING = 4
"""Accuracy level of a `MatMulNBits`: what it reads is rounded to 8 bits, as ONNX Runtime does by itself where it makes one of a DequantizeLinear."""


@dataclass(frozen=True)
class Block:
    """A matrix of weights in groups, in the forms that a file holds, made before anybody traces.

    Attributes:
        group: How many weights of an output share a scale.
        bits: How many bits an integer takes in the file, 4 or 8.
        integers: int8, (outputs, inputs), contiguous.
        scale: float32, (outputs, groups).
        packed: uint8, (outputs, bytes): integers above 0 by half of their range, two of 4 bits in a byte, the first one in its lower half. For ONNX Runtime's
            own operators; `None`: it needs none.
        zeros: int8, (outputs, groups): the zero point of each group; `None`: 0.
        packed_zeros: These as ``packed`` has the integers, (outputs, bytes).
        matrix: Integers and scales for a DequantizeLinear, and zero points if there are any, with which both are unsigned (OpenVINO 2026.4 rounds what it
            multiplies unsigned ones with, which is faster, but not signed ones): before a product as (inputs, outputs) and (groups, outputs), of a table as
            they are.
        looked_up: Whether rows of it are looked up.
    """

    group: int
    bits: int
    integers: Tensor
    scale: Tensor
    matrix: tuple[Tensor, ...]
    looked_up: bool = False
    packed: Tensor | None = None
    zeros: Tensor | None = None
    packed_zeros: Tensor | None = None

    @property
    def as_it_is(self) -> bool:
        """Whether engines multiply it, or look rows up, without making floats of all of it before."""
        return self.packed is not None or not self.looked_up


def blocks_of(
    weights: Mapping[str, list[IntegerWeight]],
    lookups: Container[str],
    own: Container[str] | None,
    sizes: Mapping[str, int],
    dynamic: Container[str] = (),
) -> dict[str, Block]:
    """The weights of all layers that have them in groups, or whose channels are written as groups since several layers read them.

    Args:
        weights: The integer weights by layer.
        lookups: Layers that look rows up.
        own: Layers that are written as operators of the engine's own. So are products with what something else reads as well, such as a head that is tied to
            an embedding, or a layer that is called twice. `None`: the engine has no such operators.
        sizes: Layers without groups whose weights alone are integers, and of which size groups could be.
        dynamic: Layers that round what they read when they run: always in the form of groups.
    """
    grouped = {name: stored[0] for name, stored in weights.items() if stored and stored[0].group is not None}
    if own is not None:
        grouped |= {name: _by_channel(weights[name][0], size) for name, size in sizes.items() if weights[name][0].group is None}
    found = {name: _plain_block(weight, name in lookups) for name, weight in grouped.items()}
    marks = {name: _mark(block) for name, block in found.items()}
    counts = Counter(marks.values())
    found = {
        name: block
        for name, block in found.items()
        if counts[marks[name]] > 1 or name not in sizes or name in dynamic or weights[name][0].group is not None
    }
    packed: dict[bytes, tuple[Tensor, Tensor | None]] = {}
    for name, block in list(found.items()):
        mark = marks[name]
        if own is not None and (name in own or counts[mark] > 1):
            if mark not in packed:
                zeros = None if block.zeros is None else _packed(block.zeros, block.bits)
                packed[mark] = _packed(block.integers, block.bits), zeros
            found[name] = replace(block, packed=packed[mark][0], packed_zeros=packed[mark][1])
    return found


def _by_channel(weight: IntegerWeight, size: int) -> IntegerWeight:
    """A matrix with one scale for each channel, or for all, as one in groups with equal scales."""
    blocks = 1 - (weight.axis or 0)
    shape = [weight.integers.shape[0], weight.integers.shape[1]]
    shape[blocks] //= size
    scale = weight.scale.unsqueeze(blocks) if weight.scale.dim() else weight.scale
    integers = (weight.integers.to(torch.int16) - weight.zero_point).to(torch.int8)
    return replace(weight, integers=integers, scale=scale.expand(shape).contiguous(), axis=blocks, zero_point=0, group=size)


def _plain_block(weight: IntegerWeight, looked_up: bool) -> Block:
    assert weight.group is not None
    stored = (weight.integers, weight.scale) if weight.zero_points is None else (weight.integers, weight.scale, weight.zero_points)
    integers, scale, *zeros = ((part if weight.axis == 1 else part.t()).contiguous() for part in stored)
    few = all(within_bits(part.cpu().numpy(), 4) for part in (integers, *zeros))
    bits = 4 if few else 8
    matrix: tuple[Tensor, ...] = (integers, scale)
    if zeros:
        matrix = _unsigned(integers, bits), scale, _unsigned(zeros[0], bits)
    if not looked_up:
        matrix = tuple(part.t().contiguous() for part in matrix)
    return Block(weight.group, bits, integers, scale, matrix, looked_up, zeros=zeros[0] if zeros else None)


def _mark(block: Block) -> bytes:
    found = hashlib.sha256(repr((block.group, tuple(block.integers.shape))).encode())
    for tensor in (block.integers, block.scale, *(() if block.zeros is None else (block.zeros,))):
        found.update(tensor.cpu().numpy().tobytes())
    return found.digest()


def _unsigned(integers: Tensor, bits: int) -> Tensor:
    return (integers.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def _packed(integers: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return _unsigned(integers, bits)
    halves = F.pad(_unsigned(integers, bits), (0, integers.shape[1] % 2))
    return halves[:, ::2] | (halves[:, 1::2] << 4)


def unpacked(values: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """The integers of packed ones, (outputs, inputs), or more where their number is odd."""
    rows = values.reshape(len(values), -1)
    if bits == 8:
        return rows.astype(np.int16) - 128
    return np.stack([rows & 15, rows >> 4], -1).reshape(len(rows), -1).astype(np.int16) - 8


def dequantized(write: Write, block: Block) -> Tensor:
    """A matrix as (inputs, outputs), or a table as it is, made of blocks of integers: before a product, engines fuse both."""
    integers, axis = block.matrix[0], 1 if block.looked_up else 0
    return write("DequantizeLinear", block.matrix, integers.shape, torch.float32, {"axis": axis, "block_size": block.group})


def product(write: Write, x: Tensor, block: Block) -> Tensor:
    """A product with a matrix, (…, inputs) → (…, outputs)."""
    if block.packed is None:
        return x @ dequantized(write, block)
    outputs, groups = block.scale.shape
    integers = block.packed.view(outputs, groups, -1)
    attributes = {"K": groups * block.group, "N": outputs, "bits": block.bits, "block_size": block.group, "accuracy_level": _ROUNDING}
    zeros = () if block.packed_zeros is None else (block.packed_zeros,)
    return write(f"{DOMAIN}::{PRODUCT}", (x, integers, block.scale, *zeros), (*x.shape[:-1], outputs), x.dtype, attributes)


def rows(write: Write, block: Block, indices: Tensor) -> Tensor:
    """Rows of a table, scaled group by group; (…) → (…, inputs). Where the engine has no operator for it, integers of 8 bits are looked up."""
    if block.packed is None:
        values = looked_up_integers(block, indices)
        result: Tensor = (values * F.embedding(indices, block.scale).unsqueeze(-1)).flatten(-2)
        return result
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block.group, "bits": block.bits}
    shape = (*indices.shape, block.integers.shape[1])
    zeros = () if block.packed_zeros is None else (block.packed_zeros,)
    return write(f"{DOMAIN}::{LOOKUP}", (block.packed, indices, block.scale, *zeros), shape, torch.float32, attributes)


def rounds_as_it_runs(node: Any) -> bool:
    """Whether a product rounds what it reads to 8 bits, block by block."""
    return any(attribute.name == "accuracy_level" and attribute.i == _ROUNDING for attribute in node.attribute)


def looked_up_integers(block: Block, indices: Tensor) -> Tensor:
    """Rows of integers with their zero points taken off, as floats, (…) → (…, groups, values of one)."""
    values = F.embedding(indices, block.integers).to(torch.float32).view(*indices.shape, block.scale.shape[1], block.group)
    return values if block.zeros is None else values - F.embedding(indices, block.zeros).to(torch.float32).unsqueeze(-1)


def share_packed(graph: Any) -> None:
    """Store what products and lookups have of packed integers once: the product reads those of the table in another shape."""
    import onnx_ir

    tables = {}
    for node in graph:
        if node.op_type == LOOKUP and (array := constant(node.inputs[0])) is not None:
            tables[hashlib.sha256(array.tobytes()).digest()] = node.inputs[0]
    for node in list(graph):
        array = constant(node.inputs[1]) if node.op_type == PRODUCT else None
        table = tables.get(hashlib.sha256(array.tobytes()).digest()) if array is not None else None
        if table is None or array is None:
            continue
        shape = initializer(graph, f"{node.outputs[0].name}_shape", np.array(array.shape, np.int64))
        reshape = onnx_ir.node("Reshape", [table, shape], name=f"{node.outputs[0].name}_blocks")
        reshape.metadata_props.update(node.metadata_props)
        reshape.outputs[0].name, reshape.outputs[0].dtype = f"{node.outputs[0].name}_integers", table.dtype
        graph.insert_before(node, reshape)
        node.replace_input_with(1, reshape.outputs[0])
