"""What a file stores of weights in blocks, read from its nodes, and whether it is what it should be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_cco.export.weight_blocks import LOOKUP, PRODUCT, unpacked

Array = np.ndarray[Any, Any]
ALMOST = 1e-3
"""Of a step: what float32 leaves of a weight."""
_ROWS = 2048
"""So many rows of a matrix are compared at a time: the tables of language models are large."""


@dataclass(frozen=True)
class StoredBlocks:
    """A matrix in blocks, as a node of a file has it.

    Attributes:
        integers: (outputs, inputs).
        scale: (outputs, blocks).
        size: How many integers share a scale.
        zeros: Zero points, as the scales; `None`: 0.
    """

    integers: Array
    scale: Array
    size: int
    zeros: Array | None = None

    def off(self, matrices: Iterable[Array]) -> str:
        """How far it is from the nearest of the matrices of which it may be one, or their transposes, in words; empty: no further than float32 makes it."""
        if self.integers.shape != (self.scale.shape[0], self.scale.shape[1] * self.size):
            return f"it has {self.scale.shape} scales of {self.size} integers each, which are {self.integers.shape}"
        integers = self.integers
        if self.zeros is not None:
            if self.zeros.shape != self.scale.shape:
                return f"it has {self.scale.shape} scales and {self.zeros.shape} zero points"
            integers = integers.astype(np.int16) - np.repeat(self.zeros.astype(np.int16), self.size, 1)
        worst = np.inf
        for matrix in matrices:
            for wanted in (matrix, matrix.T):
                if wanted.shape == integers.shape:
                    worst = min(worst, max(self._steps_off(integers, wanted), default=0.0))
        return "" if worst <= ALMOST else f"its stored weights differ by up to {worst:.3g} steps of scale"

    def _steps_off(self, integers: Array, wanted: Array) -> Iterator[float]:
        """How far the matrix is at most from the one expected, in steps of its scales, some rows after the other."""
        for start in range(0, len(integers), _ROWS):
            rows = slice(start, start + _ROWS)
            step = np.repeat(self.scale[rows], self.size, 1)
            off = np.abs(integers[rows].astype(np.float32) * step - wanted[rows]) / np.maximum(step, 1e-30)
            yield float(off.max(initial=0.0))


def stored_blocks(model: Any, values: Mapping[str, Any], node: Any) -> StoredBlocks | str | None:
    """The blocks that a node holds; what is wrong with it, in words; `None`: it holds none."""
    if node.op_type == "DequantizeLinear":
        arrays = [values.get(name) for name in node.input]
        axis, size = attribute(node, "axis", 1), attribute(node, "block_size", 0)
        if not size or arrays[0] is None or arrays[1] is None:
            return None
        integers, scale, *zeros = (array if axis == 1 else array.T for array in arrays if array is not None)
        return StoredBlocks(integers, scale, size, zeros[0] if zeros else None)
    if node.op_type not in (PRODUCT, LOOKUP):
        return None
    parts = ((1, 2) if node.op_type == PRODUCT else (0, 2)) + ((3,) if len(node.input) > 3 else ())
    packed, scales, *rest = (values.get(_constant_of(model, node.input[at])) for at in parts)
    if packed is None or scales is None or any(array is None for array in rest):
        return "its weights are no constants of the file"
    bits, scale = attribute(node, "bits", 4), scales.reshape(len(packed), -1)
    points = unpacked(rest[0].reshape(len(packed), -1), bits)[:, : scale.shape[1]] if rest and rest[0] is not None else None
    return StoredBlocks(unpacked(packed, bits), scale, attribute(node, "block_size", 0), points)


def attribute(node: Any, name: str, otherwise: int) -> int:
    """A whole number among the attributes of a node."""
    return next((int(entry.i) for entry in node.attribute if entry.name == name), otherwise)


def _constant_of(model: Any, name: str) -> str:
    """The constant that a value is, seen through a Reshape."""
    return next((str(node.input[0]) for node in model.graph.node if node.op_type == "Reshape" and name in node.output), name)
