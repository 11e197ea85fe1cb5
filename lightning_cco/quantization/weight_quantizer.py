"""The quantizer of a weight: a module without a state of its own, whose scales come from the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_cco.quantization.qparams import quant_range, weight_scale
from lightning_cco.quantization.ranges import weight_estimator
from lightning_cco.quantization.tracing import runs_plainly
from lightning_cco.quantization.weight_fake_quantize import fake_quantize_weight
from lightning_cco.quantization.weight_recompute import RecomputedWeight, recomputed_weight

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

    Attributes:
        estimator: Which one it is; never ``auto``.
    """

    def __init__(self, num_bits: int = 8, axis: int | None = 0, estimator: str = "minmax") -> None:
        super().__init__()
        self.num_bits, self.axis, self.estimator = num_bits, axis, weight_estimator(estimator, num_bits)
        self._kept: tuple[tuple[Any, ...], Tensor, Tensor, Tensor] | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Bits and estimator."""
        return self.num_bits, self.estimator

    def forward(self, weight: Tensor, recomputed: list[RecomputedWeight] | None = None) -> Tensor:
        """Fake-quantize; the gradient is that of the identity.

        Args:
            weight: The weight.
            recomputed: Takes what makes the result again in the backward, if that is possible and worth it.
        """
        if not torch.compiler.is_compiling() and not runs_plainly():  # first: traced weights have no numbers to compare
            return self._rounded(weight)
        room = recomputed_weight(weight, self.axis) if recomputed is not None else None
        if room is not None and recomputed is not None:
            self._kept = None
            recomputed.append(room)
            return self._rounded(weight, room)
        # What is computed from parameters (a parametrization) is a new tensor each time, often at the address of the last one: nothing to keep.
        owner = weight._base if weight._base is not None else weight
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not isinstance(owner, nn.Parameter) or weight.is_inference():
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

    def _rounded(self, weight: Tensor, recomputed: RecomputedWeight | None = None) -> Tensor:
        return fake_quantize_weight(weight, self.num_bits, self.axis, recomputed, self.estimator == "mse")

    def scale(self, weight: Tensor) -> Tensor:
        """The scale of each channel, as `weight_scale` shapes it."""
        return weight_scale(weight, self.num_bits, self.axis, self.estimator == "mse")

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The integers themselves.

        Returns:
            int8 of the weight's shape, and the scale as `weight_scale` shapes it.
        """
        scale = self.scale(weight)
        low, high = quant_range(self.num_bits, symmetric=True)
        return weight.detach().float().mul(scale.reciprocal()).round().clamp(low, high).to(torch.int8), scale

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with nothing kept."""
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        """Bits, axis and estimator."""
        return f"num_bits={self.num_bits}, axis={self.axis}, {self.estimator}"
