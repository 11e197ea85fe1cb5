"""PT2E: ``torch.ops.quantized_decomposed`` in a `torch.export` program, which ExecuTorch, LiteRT, Core ML and the compiler for x86 read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_cco.compat.decomposed import operators
from lightning_cco.export.dialects.dialect import Format
from lightning_cco.export.fold_batch_norm import IntegerWeight
from lightning_cco.export.provenance import noting_pair
from lightning_cco.export.weight_blocks import Block, looked_up_integers

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SHIFT = 128
"""What zero points of int8 are less than those of uint8."""


class Pt2eDialect:
    """Writes ``quantize_per_tensor`` and ``dequantize_per_tensor`` with all levels of their type.

    Engines read no narrower range, so what is narrower is clamped as floats before.

    Args:
        signed: Whether what has a zero point is stored in int8 instead of uint8, by a zero point that is less by 128.
    """

    products_on_rows = False

    def __init__(self, signed: bool = True) -> None:
        self.signed, self._operators = signed, operators()
        self._weights: dict[int, tuple[Any, ...]] = {}
        self._written: list[tuple[str, Tensor, tuple[Any, ...]]] = []

    def stored(self, format: Format) -> tuple[float, int, int, int, torch.dtype]:
        """Scale, zero point, first and last level, and type of the integers in the program."""
        dtype = format.zero_point.dtype
        shift = SHIFT if self.signed and dtype is torch.uint8 else 0
        dtype = torch.int8 if shift else dtype
        info = torch.iinfo(dtype)
        return format.step, format.zero - shift, info.min, info.max, dtype

    def pair(self, x: Tensor, format: Format, name: str, limits: tuple[int, int] | None = None) -> Tensor:
        """Quantize and dequantize; limits are a clamp of floats before."""
        if limits is not None:
            x = x.clamp(format.value(limits[0]), format.value(limits[1]))
        numbers = self.stored(format)
        double = x.dtype is torch.float64  # which the operator does not take
        x = x.to(torch.float32) if double else x
        with noting_pair(name):
            levels = self._operators.quantize(x, *numbers)
        self._written.append((name, levels, numbers))
        values: Tensor = self._operators.dequantize(levels, *numbers)
        return values.to(torch.float64) if double else values

    def prepare(self, weights: Iterable[IntegerWeight]) -> None:
        """Scales as numbers, zero points as tensors."""
        self._written = []
        self._weights = {id(weight): (weight, *self._dequantize(weight)) for weight in weights}

    def weight(self, weight: IntegerWeight, block: Block | None) -> Tensor:
        """Dequantize a constant: one scale, one a channel, or one a group."""
        _, operator, args = self._weights[id(weight)]
        result: Tensor = operator(*args)
        return result.t() if weight.group is not None and weight.axis == 0 else result

    def _dequantize(self, weight: IntegerWeight) -> tuple[Any, tuple[Any, ...]]:
        """The operator and its arguments."""
        integers, scale, dtype = weight.integers, weight.scale, weight.integers.dtype
        first, last = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        if weight.group is not None:
            zeros = torch.zeros_like(scale, dtype=torch.int32) if weight.zero_points is None else weight.zero_points.to(torch.int32)
            if weight.axis == 0:
                integers, scale, zeros = (part.t().contiguous() for part in (integers, scale, zeros))
            return self._operators.dequantize_groups, (integers, scale, zeros, first, last, dtype, weight.group, torch.float32)
        if weight.axis is None or scale.dim() == 0:
            return self._operators.dequantize, (integers, float(scale), weight.zero_point, first, last, dtype)
        zeros = torch.full_like(scale, weight.zero_point, dtype=torch.int64)
        return self._operators.dequantize_channels, (integers, scale, zeros, weight.axis, first, last, dtype)

    @property
    def pairs(self) -> list[tuple[str, float]]:
        """Of each pair that was written, in order, quantizer and scale."""
        return [(name, numbers[0]) for name, _, numbers in self._written]

    def rounded(self, wanted: Callable[[str], bool]) -> list[Tensor]:
        """The values of those of these pairs that are wanted, each a tensor of its own, which nothing in the model writes to."""
        return [self._operators.dequantize(levels, *numbers) for name, levels, numbers in self._written if wanted(name)]

    def bias(self, value: Tensor, scale: Tensor | None) -> Tensor:
        """In float: engines quantize it to the scale of their accumulator."""
        return value if scale is None else value.float() * scale

    def average(self, x: Tensor) -> Tensor:
        """The mean over height and width, which stay."""
        return x.mean((2, 3), keepdim=True)

    def pixel_blocks(self, x: Tensor) -> Tensor:
        """Block by block, then channel by channel."""
        n, channels, height, width = x.shape
        blocks = x.reshape(n, channels, height // 2, 2, width // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return blocks.reshape(n, 4 * channels, height // 2, width // 2)

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, pads: tuple[int, int, int, int] | None) -> Tensor:
        """PyTorch's own."""
        if pads is not None:
            x = F.pad(x, (pads[1], pads[3], pads[0], pads[2]))
        result: Tensor = _CONVOLUTIONS[x.dim() - 2](x, weight, bias, groups=groups)
        return result

    def product(self, x: Tensor, block: Block) -> Tensor | None:
        """As PyTorch has it."""
        return None

    def rows(self, block: Block, indices: Tensor) -> Tensor:
        """Rows of integers, scaled group by group."""
        values = looked_up_integers(block, indices)
        return (values * F.embedding(indices, block.scale).unsqueeze(-1)).flatten(-2)
