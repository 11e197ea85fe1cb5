"""The quantizer of a weight: a module without state, whose scales come from the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_cco.errors import CCOError
from lightning_cco.quantization.differentiable_operations import rounded_weight, straight_through
from lightning_cco.quantization.qparams import Bound, quant_range, weight_scale
from lightning_cco.quantization.ranges import weight_estimator
from lightning_cco.quantization.tracing import runs_plainly
from lightning_cco.quantization.weight_fake_quantize import fake_quantize_small_weight, fake_quantize_weight
from lightning_cco.quantization.weight_recompute import LEAST_RECOMPUTED, RecomputedWeight, recomputed_weight

# How many values of a weight along each axis are compared to notice a change that its version does not show.
_FINGERPRINT = 8


class WeightQuantizer(nn.Module):
    """Fake-quantizes a weight with scales of its own, symmetric, computed anew from the weight.

    Without gradients the result for a parameter is kept until the parameter changes. With gradients it is not, so that its memory is free for
    gradients as soon as the backward has passed.

    Args:
        num_bits: 2 to 8.
        axis: Axis of the output channels; `None`: one scale for the whole tensor.
        estimator: ``minmax``: scales of the largest magnitudes; ``mse``: those at which rounding and clipping together lose least; ``auto``: ``mse`` up to 4
            bits, ``minmax`` above.
        group: How many weights of an output share a scale, for matrices of weights; `None`: all of them.

    Attributes:
        estimator: Which one it is; never ``auto``.
        blocks: The axis along which the weights are cut into groups; `None`: there are none.
        symmetric: Whether 0 is the middle of the levels, and there are no zero points.
        cut_from: Module and attribute of the tensor that this weight is cut from, and the indices of the piece of it: its scale is that of the whole, whatever
            part of it comes. `None`: what comes is the whole.
    """

    symmetric = True

    def __init__(self, num_bits: int = 8, axis: int | None = 0, estimator: str = "minmax", group: int | None = None) -> None:
        super().__init__()
        self.num_bits, self.axis, self.estimator = num_bits, axis, weight_estimator(estimator, num_bits)
        self.group, self.blocks = group, None if group is None or axis is None else 1 - axis
        self.cut_from: tuple[nn.Module, str, tuple[int, ...]] | None = None
        self._kept: tuple[tuple[Any, ...], Tensor, Tensor, Tensor] | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Bits, estimator, and size of the groups."""
        return self.num_bits, self.estimator, self.group

    @property
    def in_rows(self) -> bool:
        """Whether kernels are given rows of a matrix of weights, instead of the weight itself."""
        return self.group is not None

    def of_bits(self, num_bits: int, estimator: str) -> WeightQuantizer:
        """One of the same weight with another number of bits."""
        quantizer = WeightQuantizer(num_bits, self.axis, estimator, self.group)
        quantizer.cut_from = self.cut_from
        return quantizer

    def forward(self, weight: Tensor, recomputed: list[RecomputedWeight] | None = None) -> Tensor:
        """Fake-quantize; the gradient is that of the identity.

        Args:
            weight: The weight.
            recomputed: Takes what makes the result again in the backward, if that is possible and worth it.
        """
        compiling = torch.compiler.is_compiling()
        if self._is_part(weight):
            self._kept = None  # the whole may change in a part that does not come now
            return self._rounded(weight)
        if not compiling:
            if not runs_plainly():  # first: traced weights have no numbers to compare
                return self._rounded(weight)
            if not self.in_rows and weight.requires_grad and weight.numel() < LEAST_RECOMPUTED:
                rounded = fake_quantize_small_weight(weight, self.num_bits, self.axis, self.estimator == "mse")
                if rounded is not None:
                    if self._kept is not None:  # setting a module's attribute takes a tenth of the rounding
                        self._kept = None
                    return rounded
        room = None
        if recomputed is not None:
            if self.in_rows:
                size = self._row_size(weight)
                room = recomputed_weight(weight, 0, (self._rows, torch.Size((weight.numel() // size, size))), not self.symmetric)
            else:
                room = recomputed_weight(weight, self.axis)
        if room is not None and recomputed is not None:
            self._kept = None
            recomputed.append(room)
            return self._rounded(weight, room)
        # What is computed from parameters (a parametrization) is a new tensor each time, often at the address of the last one: nothing to keep.
        owner = weight._base if weight._base is not None else weight
        if torch.is_grad_enabled() or compiling or not isinstance(owner, nn.Parameter) or weight.is_inference():
            self._kept = None
            return self._rounded(weight)
        version = weight.data_ptr(), weight._version, weight.shape
        kept = self._kept
        if kept is not None and kept[0] == version and torch.equal(kept[1], kept[2]):
            return kept[3]
        rounded = self._rounded(weight)
        # Writing through `.data` leaves the version as it is; some of the values will tell.
        some = weight.detach()[tuple(slice(None, None, -(-size // _FINGERPRINT) or 1) for size in weight.shape)]
        self._kept = version, some, some.clone(), rounded  # at once: other threads use it as well
        return rounded

    def see(self, weight: Tensor) -> None:
        """A calibration comes by: for quantizers that begin to learn there."""

    def forget(self) -> None:
        """The weights are others than before: for quantizers that learn."""

    def _rounded(self, weight: Tensor, recomputed: RecomputedWeight | None = None) -> Tensor:
        mse = self.estimator == "mse"
        if self._is_part(weight):
            return straight_through(
                rounded_weight(weight.detach(), self.scale(weight), quant_range(self.num_bits, symmetric=True)[1]), weight
            )
        if self.group is None:
            return fake_quantize_weight(weight, self.num_bits, self.axis, recomputed, mse)
        return self._from_rows(fake_quantize_weight(self._rows(weight), self.num_bits, 0, recomputed, mse), weight)

    def _row_size(self, weight: Tensor) -> int:
        """How many weights a row has."""
        return self.group or weight.shape[self.blocks or 0]

    def _rows(self, weight: Tensor) -> Tensor:
        """The groups of a matrix as rows, which are to the kernels what channels are: a view, where inputs lie beside each other."""
        size = self._row_size(weight)
        if weight.dim() != 2 or weight.shape[self.blocks or 0] % size:
            raise CCOError(
                f"weights_group_size: expected a matrix whose axis {self.blocks} is a multiple of {size}, got one of shape {tuple(weight.shape)}. "
                "Weights have changed their shape since the layers were captured; capture anew, or write weights_group_size: 0 for the layer."
            )
        return (weight if self.blocks == 1 else weight.t()).reshape(-1, size).contiguous()

    def _from_rows(self, rows: Tensor, weight: Tensor) -> Tensor:
        """What was computed of each weight, or of each row, along the axes of the weight."""
        if rows.numel() == weight.numel():
            return rows.view(weight.shape) if self.blocks == 1 else rows.view(weight.shape[::-1]).t()
        each = rows.reshape(weight.shape[1 - (self.blocks or 0)], -1)
        return each if self.blocks == 1 else each.t()

    def scale(self, weight: Tensor) -> Tensor:
        """The scale of each channel, as `weight_scale` shapes it; in groups of each of them, along the axes of the weight."""
        mse = self.estimator == "mse"
        if self.group is None:
            return weight_scale(self.whole(weight), self.num_bits, self.axis, mse).to(weight.device)
        return self._from_rows(weight_scale(self._rows(weight.detach()), self.num_bits, 0, mse), weight)

    def whole(self, weight: Tensor) -> Tensor:
        """The tensor that a weight is cut from, as its module holds it now; the weight itself if it is the whole."""
        if self.cut_from is None:
            return weight
        module, name, indices = self.cut_from
        held = getattr(module, name, None)
        if not isinstance(held, Tensor):
            return weight
        return held.detach()[indices] if indices else held

    def _is_part(self, weight: Tensor) -> bool:
        """Whether a weight is less than the tensor that it is cut from, so that its scale is another's."""
        return self.cut_from is not None and (torch.compiler.is_compiling() or self.whole(weight) is not weight)

    def scales_of(self, weight: Tensor) -> int:
        """How many scales a weight has."""
        if self.in_rows:
            return weight.numel() // self._row_size(weight)
        return 1 if self.axis is None else weight.shape[self.axis]

    def steps(self, weight: Tensor) -> Tensor:
        """The scale of each weight, in a shape that goes together with the weight's."""
        return self._of_each(self.scale(weight))

    def _of_each(self, values: Tensor) -> Tensor:
        """Values of the groups, or of the channels, in a shape that goes together with the weight's."""
        return values if self.group is None else values.repeat_interleave(self.group, self.blocks)

    def levels(self, weight: Tensor) -> tuple[Bound, Bound]:
        """First and last level of each weight with its zero point taken off, in shapes that go together with the weight's."""
        return quant_range(self.num_bits, symmetric=True)

    def zero_points(self, weight: Tensor) -> Tensor | None:
        """Zero point of each group, or of each channel, int8, of the shape of `scale`; `None`: 0."""
        return None

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The integers themselves.

        Returns:
            int8 of the weight's shape, and the scale as `scale` shapes it.
        """
        scale = self.scale(weight)
        steps = self._of_each(scale)
        low, high = quant_range(self.num_bits, symmetric=True)
        return weight.detach().float().mul(steps.reciprocal()).round().clamp(low, high).to(torch.int8), scale

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with nothing kept."""
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        """Bits, axis, size of the groups and estimator."""
        groups = "" if self.group is None else f", groups of {self.group}"
        return f"num_bits={self.num_bits}, axis={self.axis}{groups}, {self.estimator}"
