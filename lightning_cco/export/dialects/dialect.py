"""The words that every dialect has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_cco.export.fold_batch_norm import IntegerWeight
from lightning_cco.export.weight_blocks import Block
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.qparams import quant_range


@dataclass(frozen=True)
class Format:
    """How a tensor is rounded. Numbers are read before anybody traces, since a trace would make a computation of it.

    Attributes:
        scale: float32, 0-d.
        zero_point: 0-d, of the type that integers are stored in.
        step: The scale as a number.
        zero: The zero point as a number.
        levels: First and last level of a format of fewer than 8 bits; `None`: all of the type.
    """

    scale: Tensor
    zero_point: Tensor
    step: float
    zero: int
    levels: tuple[int, int] | None = None

    @classmethod
    def of(cls, quantizer: ActivationQuantizer) -> Format:
        """That of a calibrated quantizer."""
        levels = quant_range(quantizer.num_bits, quantizer.symmetric) if quantizer.num_bits < 8 else None
        dtype = torch.int8 if quantizer.symmetric else torch.uint8
        return cls.made(quantizer.scale.detach().clone(), int(quantizer.zero_point), dtype, levels)

    @classmethod
    def made(cls, scale: Tensor, zero: int, dtype: torch.dtype, levels: tuple[int, int] | None = None) -> Format:
        """From a scale (0-d or of one element), a zero point and a type."""
        return cls(scale, torch.tensor(zero, dtype=dtype, device=scale.device), float(scale), zero, levels)

    def value(self, level: int) -> float:
        """The value of a level."""
        return (level - self.zero) * self.step


class Dialect(Protocol):
    """Operators of one kind of file, each given and giving what the model's forward has there: traced tensors.

    Attributes:
        products_on_rows: Whether engines fuse weight, bias and rounding of a product of matrices alone, so that a linear layer on more dimensions is one.
    """

    products_on_rows: bool

    def prepare(self, weights: Iterable[IntegerWeight]) -> None:
        """Make what is constant of weights that `weight` will be asked for, before anybody traces."""
        ...

    def pair(self, x: Tensor, format: Format, name: str, limits: tuple[int, int] | None = None) -> Tensor:
        """Quantize and dequantize.

        Args:
            x: float32.
            format: Of the integers.
            name: Of the quantizer, to find the pair again in the file.
            limits: First and last level, if not all of the type.
        """
        ...

    def weight(self, weight: IntegerWeight, block: Block | None) -> Tensor:
        """An integer weight as floats, in its own shape; ``block``: its form, if it is in groups."""
        ...

    def bias(self, value: Tensor, scale: Tensor | None) -> Tensor:
        """A bias, (channels,), in float or as integers with a scale."""
        ...

    def average(self, x: Tensor) -> Tensor:
        """The average of each channel: (N, C, H, W) → (N, C, 1, 1)."""
        ...

    def pixel_blocks(self, x: Tensor) -> Tensor:
        """Blocks of 2 × 2 pixels as one pixel's channels, block by block: (N, C, H, W) → (N, 4 · C, H / 2, W / 2)."""
        ...

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, pads: tuple[int, int, int, int] | None) -> Tensor:
        """A convolution of stride 1 on any number of dimensions; ``pads``: top, left, bottom, right."""
        ...

    def product(self, x: Tensor, block: Block) -> Tensor | None:
        """A product with weights in groups, (…, inputs) → (…, outputs); `None`: it is written with `weight`."""
        ...

    def rows(self, block: Block, indices: Tensor) -> Tensor:
        """Rows of a table in groups: (…) → (…, columns)."""
        ...
