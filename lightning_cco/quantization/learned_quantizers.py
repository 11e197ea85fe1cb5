"""Quantizers whose scales are learned. They begin at the scales at which rounding and clipping lose least, and `ScaleLearner` moves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cco.errors import CCOError
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.differentiable_operations import rounded_weight
from lightning_cco.quantization.learned_scales import learned_activation, learned_weight
from lightning_cco.quantization.qparams import quant_range, smallest_scale, weight_scale
from lightning_cco.quantization.tracing import runs_plainly, without_gradient
from lightning_cco.quantization.weight_quantizer import WeightQuantizer
from lightning_cco.quantization.weight_recompute import RecomputedWeight


class LearnedActivationQuantizer(ActivationQuantizer):
    """Fake-quantizes an activation with a learned scale and, where the format is affine, a learned offset.

    After a clamp at 0 (ReLU) the zero point is 0 and stays there, so that the scale alone is learned: the end of the range, as in PACT. Learns where
    something before it is trained, as long as the range is not frozen.

    Args:
        num_bits: 2 to 8.
        symmetric: Whether the zero point is 0.

    Attributes:
        probe: Gets the gradients of scale and offset: float32 of 2.
        offset: ``-zero_point * scale`` before the zero point is rounded, 0-d float32.
        velocity: Momentum of both, float32 of 2.
        has_offset: Whether the offset is learned: not where the range begins at 0.
    """

    offset: Tensor
    velocity: Tensor

    def __init__(self, num_bits: int = 8, symmetric: bool = False) -> None:
        super().__init__(num_bits, symmetric, "mse")
        self.has_offset = False
        self.probe = nn.Parameter(torch.zeros(2, dtype=torch.float32, device="cpu"))
        self.register_buffer("offset", torch.zeros((), dtype=torch.float32, device="cpu"))
        self.register_buffer("velocity", torch.zeros(2, dtype=torch.float32, device="cpu"))

    @property
    def kind(self) -> tuple[Any, ...]:
        """What a range is of: one of another kind can't be taken over."""
        return self.num_bits, self.symmetric, "learned"

    @property
    def fixed(self) -> bool:
        """Whether the range does not follow what passes: it is learned, unless nothing is known of it yet."""
        return self.frozen or not self.empty

    def forward(
        self, x: Tensor, clamp: tuple[float, float] | None = None, inplace: bool = False, track: bool = False, shared: bool = False
    ) -> Tensor:
        """Fake-quantize; see `ActivationQuantizer`."""
        learns = torch.is_grad_enabled() and x.requires_grad and not (self.empty or self.frozen)
        if not learns or not (torch.compiler.is_compiling() or runs_plainly()):
            return super().forward(x, clamp, inplace, track and not self.fixed, shared)
        numbers = self.numbers() if x.is_cpu else None
        kept = x.clone() if inplace or shared else x  # the backward needs what is overwritten
        rounded = learned_activation(kept, self.probe, self.scale, self.zero_point, self.num_bits, self.symmetric, clamp, numbers)
        return x.copy_(rounded) if inplace else rounded

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute scale and zero point from the range; what was learned is forgotten."""
        super().refresh()
        self.offset.copy_(-self.zero_point * self.scale)
        self.velocity.zero_()
        self._begin()

    def _begin(self) -> None:
        self.probe.grad = None
        self.has_offset = not self.symmetric and bool(self.zero_point > 0)

    @torch.no_grad()
    def learned(self) -> None:
        """Let zero point and range follow a scale and an offset that have moved."""
        low, high = quant_range(self.num_bits, self.symmetric)
        if not self.symmetric:
            # 0 stays within the range: it is represented exactly.
            self.offset.copy_(torch.minimum(torch.maximum(self.offset, -high * self.scale), torch.zeros_like(self.offset)))
            self.zero_point.copy_((-self.offset / self.scale).round().clamp(low, high))
        self.min_val.copy_((low - self.zero_point) * self.scale)
        self.max_val.copy_((high - self.zero_point) * self.scale)

    def get_ranges(self) -> dict[str, Any]:
        """The range as plain data for a checkpoint, and how it moves."""
        return {**super().get_ranges(), "learned": torch.cat([self.offset.reshape(1), self.velocity]).detach().cpu()}

    @torch.no_grad()
    def set_ranges(self, ranges: Mapping[str, Any]) -> None:
        """Take a range over; one that was not learned is where the learning begins."""
        super().set_ranges(ranges)
        if ranges["num_bits"] == self.num_bits and "learned" in ranges:
            self.offset.copy_(ranges["learned"][0])
            self.velocity.copy_(ranges["learned"][1:])
        else:
            self.offset.copy_(-self.zero_point * self.scale)
            self.velocity.zero_()
        self._begin()

    def unfreeze(self) -> None:
        """Learn again."""
        self.frozen = False


class LearnedWeightQuantizer(WeightQuantizer):
    """Fake-quantizes a weight with scales that are learned, symmetric, one for each output channel.

    Args:
        num_bits: 2 to 8.
        axis: Axis of the output channels; `None`: one scale for the whole tensor.

    Attributes:
        scales: float32 as `weight_scale` shapes them; `None` before the calibration.
        velocity: Their momentum.
        probe: Gets their gradient.
    """

    probe: nn.Parameter | None
    scales: Tensor | None
    velocity: Tensor | None

    def __init__(self, num_bits: int = 8, axis: int | None = 0) -> None:
        super().__init__(num_bits, axis, "mse")
        self.register_buffer("scales", None)
        self.register_buffer("velocity", None)
        self.register_parameter("probe", None)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Bits, estimator, and size of the groups."""
        return self.num_bits, "learned", None

    @property
    def _limit(self) -> int:
        return quant_range(self.num_bits, symmetric=True)[1]

    def forget(self) -> None:
        """The weights are others: begin anew."""
        self.scales = self.velocity = self.probe = self._kept = None

    @torch.no_grad()
    def see(self, weight: Tensor) -> None:
        """Begin at the scales that lose least of a weight, unless there are some."""
        if self.scales is None:
            self._take(weight_scale(self.whole(weight), self.num_bits, self.axis, mse=True), None)

    def _take(self, scales: Tensor, velocity: Tensor | None) -> None:
        self.scales = scales.detach().clone().float()
        self.velocity = torch.zeros_like(self.scales) if velocity is None else velocity.detach().clone().float()
        self.probe = nn.Parameter(torch.zeros_like(self.scales))
        self._kept = None

    def forward(self, weight: Tensor, recomputed: list[RecomputedWeight] | None = None) -> Tensor:
        """Fake-quantize; see `WeightQuantizer`. Nothing is made again in the backward."""
        compiling = torch.compiler.is_compiling()
        if not compiling and runs_plainly() and not torch.is_inference_mode_enabled():
            self.see(weight)
            self._check(weight)
            if self.scales is not None and self.scales.device != weight.device:
                self._take(self.scales.to(weight.device), self.velocity.to(weight.device) if self.velocity is not None else None)
        learns = torch.is_grad_enabled() and weight.requires_grad and self.scales is not None
        if learns and (compiling or runs_plainly()):
            assert self.scales is not None
            assert self.probe is not None
            return learned_weight(weight, self.probe, self.scales, self._limit)
        return super().forward(weight)

    def _check(self, weight: Tensor) -> None:
        channels = 1 if self.axis is None else weight.shape[self.axis]
        if self.scales is not None and self.scales.numel() != channels:
            raise CCOError(
                f"weight_estimator: learned: expected a weight of {self.scales.numel()} channels, got one of {channels}. The scales are those of another "
                "model: build it as it was when they were saved, or calibrate anew."
            )

    def _rounded(self, weight: Tensor, recomputed: RecomputedWeight | None = None) -> Tensor:
        values = without_gradient(weight)
        rounded = rounded_weight(values, self.scale(weight), self._limit)
        return rounded + (weight - values) if torch.is_grad_enabled() else rounded

    def scale(self, weight: Tensor) -> Tensor:
        """The scale of each channel, as `weight_scale` shapes it; of a weight that no calibration has seen the one that loses least."""
        if self.scales is None:
            return weight_scale(self.whole(weight), self.num_bits, self.axis, mse=True).to(weight.device)
        return self.scales.to(weight.device).clamp(min=smallest_scale())

    def learned(self) -> None:
        """What was rounded by other scales is not kept."""
        self._kept = None

    def get_scales(self) -> dict[str, Tensor]:
        """Scales and momentum as plain data for a checkpoint; empty before the calibration."""
        if self.scales is None or self.velocity is None:
            return {}
        return {"scales": self.scales.detach().clone().cpu(), "velocity": self.velocity.detach().clone().cpu()}

    def set_scales(self, saved: Mapping[str, Tensor]) -> None:
        """Take scales over."""
        if not saved:
            self.forget()
            return
        self._take(saved["scales"], saved["velocity"])

    def extra_repr(self) -> str:
        """Bits and axis."""
        return f"num_bits={self.num_bits}, axis={self.axis}, learned"
