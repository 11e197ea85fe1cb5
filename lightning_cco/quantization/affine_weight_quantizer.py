"""The quantizer of a weight whose groups, or channels, have zero points as well as scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_cco.quantization.affine_weights import affine_weight_qparams, fake_quantize_affine_rows
from lightning_cco.quantization.qparams import Bound
from lightning_cco.quantization.weight_quantizer import WeightQuantizer
from lightning_cco.quantization.weight_recompute import RecomputedWeight


class AffineWeightQuantizer(WeightQuantizer):
    """Fake-quantizes a matrix of weights on affine grids, with scale and zero point of each group, or of each channel, computed anew from the weight.

    All ``2 ** num_bits`` levels are used. The integers are signed, from ``-2 ** (num_bits - 1)`` on, and so are the zero points.

    Args:
        num_bits: 2 to 8.
        axis: Axis of the output channels, 0 or 1.
        estimator: As for `WeightQuantizer`.
        group: How many weights of an output share a scale and a zero point; `None`: all of them.
    """

    symmetric = False

    def __init__(self, num_bits: int = 8, axis: int = 0, estimator: str = "minmax", group: int | None = None) -> None:
        super().__init__(num_bits, axis, estimator, group)
        self.blocks = 1 - axis

    @property
    def kind(self) -> tuple[Any, ...]:
        """Bits, estimator, size of the groups, and that the grids are affine."""
        return *super().kind, "affine"

    @property
    def in_rows(self) -> bool:
        """Whether kernels are given rows of a matrix of weights: always."""
        return True

    def of_bits(self, num_bits: int, estimator: str) -> WeightQuantizer:
        """One of the same weight with another number of bits."""
        return AffineWeightQuantizer(num_bits, self.axis or 0, estimator, self.group)

    def _rounded(self, weight: Tensor, recomputed: RecomputedWeight | None = None) -> Tensor:
        rounded = fake_quantize_affine_rows(self._rows(weight), self.num_bits, recomputed, self.estimator == "mse")
        return self._from_rows(rounded, weight)

    def _qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = affine_weight_qparams(self._rows(weight.detach()), self.num_bits, self.estimator == "mse")
        return self._from_rows(scale, weight), self._from_rows(zero, weight)

    def scale(self, weight: Tensor) -> Tensor:
        """The scale of each group along the axes of the weight; of each channel with a size of 1 along the other axis."""
        return self._qparams(weight)[0]

    def zero_points(self, weight: Tensor) -> Tensor | None:
        """Zero point of each group, or of each channel, int8, of the shape of `scale`."""
        zero: Tensor = self._qparams(weight)[1] - 2 ** (self.num_bits - 1)
        return zero.to(torch.int8)

    def levels(self, weight: Tensor) -> tuple[Bound, Bound]:
        """First and last level of each weight with its zero point taken off."""
        zero = self._of_each(self._qparams(weight)[1])
        return -zero, 2**self.num_bits - 1 - zero

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The integers themselves, from which the zero points are yet to be taken.

        Returns:
            int8 of the weight's shape, and the scale as `scale` shapes it.
        """
        scale, zero = self._qparams(weight)
        steps, zero = self._of_each(scale), self._of_each(zero)
        levels = weight.detach().float().mul(steps.reciprocal()).round() + zero
        return levels.clamp(0, 2**self.num_bits - 1).sub(2 ** (self.num_bits - 1)).to(torch.int8), scale

    def extra_repr(self) -> str:
        """Bits, axis, size of the groups and estimator."""
        return f"{super().extra_repr()}, with zero points"
