"""Quantizers: modules that hold a range (activations) or none (weights) and fake-quantize with it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_cco.quantization.fake_quantize import affine_qparams, fake_quantize, fake_quantize_weight, quant_range, weight_scale
from lightning_cco.quantization.ranges import batch_range, mse_clip_ratio, percentile_range, sample

_RANGE_BUFFERS = ("min_val", "max_val", "scale", "zero_point", "clip_ratio")


class ActivationQuantizer(nn.Module):
    """Fake-quantizes one activation tensor with one scale and zero point.

    Buffers are written in place, never assigned: a buffer assigned under ``trainer.validate`` would be an inference tensor for good.

    Args:
        num_bits: 2 to 8.
        symmetric: Whether the zero point is 0.
        estimator: ``moving_average``, ``min_max``, ``percentile`` or ``mse``.
        averaging_constant: Share of a training batch's range in the moving average.
        percentile: Share of values, in per cent, that the ``percentile`` estimator keeps at each end.

    Attributes:
        frozen: Whether the range stays as it is.
        observing: Whether `observe` looks at what it is given.
        min_val, max_val: The range, 0-d float32.
        scale, zero_point: What follows from it, 0-d float32.
        clip_ratio: Factor of the range that the ``mse`` estimator found.
    """

    min_val: Tensor
    max_val: Tensor
    scale: Tensor
    zero_point: Tensor
    clip_ratio: Tensor
    non_finite: Tensor

    def __init__(
        self,
        num_bits: int = 8,
        symmetric: bool = False,
        estimator: str = "moving_average",
        averaging_constant: float = 0.05,
        percentile: float = 99.99,
    ) -> None:
        super().__init__()
        self.num_bits, self.symmetric, self.estimator = num_bits, symmetric, estimator
        self.averaging_constant, self.percentile = averaging_constant, percentile
        self.frozen = False
        self.observing = True
        self.observed = 0
        self._samples: list[Tensor] = []
        # The zero point as a Python number: clamping to tensors is four times slower on a CPU. None: not known.
        self._zero_point: float | None = None
        for name in _RANGE_BUFFERS:
            self.register_buffer(name, torch.ones(()) if name in ("scale", "clip_ratio") else torch.zeros(()))
        self.register_buffer("non_finite", torch.zeros((), dtype=torch.bool))

    def start_calibration(self) -> None:
        """Forget what was observed before."""
        self.observed = 0
        self._samples.clear()
        self.non_finite.zero_()
        self.clip_ratio.fill_(1.0)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Widen or average the range by a calibration batch.

        Args:
            x: The float activation, any shape.
        """
        if not self.observing:
            return
        low, high = self._range_of(x)
        self.non_finite.logical_or_(~torch.isfinite(low + high))
        if self.observed == 0:
            self.min_val.copy_(low)
            self.max_val.copy_(high)
        elif self.estimator in ("min_max", "mse"):
            self.min_val.copy_(torch.minimum(self.min_val, low))
            self.max_val.copy_(torch.maximum(self.max_val, high))
        else:  # the plain mean over the calibration batches
            self.min_val.lerp_(low, 1.0 / (self.observed + 1))
            self.max_val.lerp_(high, 1.0 / (self.observed + 1))
        if self.estimator == "mse":
            self._samples.append(sample(x))
        self.observed += 1

    @torch.no_grad()
    def finish_calibration(self) -> str:
        """Turn what was observed into a scale.

        Returns:
            ``ok``, ``never_observed`` (the range is then [0, 0]) or ``non_finite`` (a NaN or an infinity came).
        """
        if bool(self.non_finite):
            return "non_finite"
        if self._samples:
            values = torch.cat(self._samples)
            self.clip_ratio.copy_(mse_clip_ratio(values, self.min_val, self.max_val, self.num_bits, self.symmetric))
            self.min_val.mul_(self.clip_ratio)
            self.max_val.mul_(self.clip_ratio)
            self._samples.clear()
        self.refresh()
        return "ok" if self.observed else "never_observed"

    def _range_of(self, x: Tensor, clamp: tuple[float, float] | None = None) -> tuple[Tensor, Tensor]:
        if self.estimator == "percentile":
            return percentile_range(x, self.percentile, clamp)
        return batch_range(x, clamp)

    @torch.no_grad()
    def refresh(self) -> Tensor:
        """Compute scale and zero point from the range.

        Returns:
            The scale as a tensor of its own, which autograd may keep while the buffer goes on changing.
        """
        scale, zero_point = affine_qparams(self.min_val, self.max_val, self.num_bits, self.symmetric)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self._zero_point = 0.0 if self.symmetric else None
        return scale

    @torch.no_grad()
    def _track(self, x: Tensor, clamp: tuple[float, float] | None) -> Tensor:
        low, high = self._range_of(x, clamp)
        if self.estimator == "min_max":
            self.min_val.copy_(torch.minimum(self.min_val, low))
            self.max_val.copy_(torch.maximum(self.max_val, high))
        else:
            self.min_val.lerp_(low * self.clip_ratio, self.averaging_constant)
            self.max_val.lerp_(high * self.clip_ratio, self.averaging_constant)
        return self.refresh()

    def forward(
        self, x: Tensor, clamp: tuple[float, float] | None = None, inplace: bool = False, track: bool = False, overwritten: bool = False
    ) -> Tensor:
        """Fake-quantize.

        Args:
            x: The activation, any shape, any float type.
            clamp: An activation function to apply on the way, as an interval.
            inplace: Overwrite ``x``.
            track: Whether the range follows this batch first, unless it is frozen.
            overwritten: Whether the caller goes on to overwrite the result.
        """
        # Two forwards may come before one backward (a Siamese network, a discriminator): the first must not keep the buffer.
        scale = self._track(x, clamp) if track and not self.frozen else self.scale
        zero_point: Tensor | float = self.zero_point
        if not torch.compiler.is_compiling() and x.device.type == "cpu":
            if self._zero_point is None:
                self._zero_point = float(self.zero_point)
            zero_point = self._zero_point
        return fake_quantize(x, scale, zero_point, self.num_bits, self.symmetric, clamp, inplace, overwritten)

    def freeze(self) -> None:
        """Keep the range as it is from now on."""
        self.frozen = True

    def unfreeze(self) -> None:
        """Let the range follow the activations again."""
        self.frozen = False

    def get_ranges(self) -> dict[str, Any]:
        """The range as plain data for a checkpoint."""
        return {"num_bits": self.num_bits, **{name: getattr(self, name).detach().clone().cpu() for name in _RANGE_BUFFERS}}

    @torch.no_grad()
    def set_ranges(self, ranges: Mapping[str, Any]) -> None:
        """Take a range over, to the last bit if it is of the same number of bits."""
        for name in _RANGE_BUFFERS:
            getattr(self, name).copy_(ranges[name])
        self.observed = max(1, self.observed)
        self._zero_point = None
        if ranges["num_bits"] != self.num_bits:
            self.refresh()

    def extra_repr(self) -> str:
        """Bits, format, range and scale."""
        form = "symmetric" if self.symmetric else "affine"
        state = ", frozen" if self.frozen else ""
        limits = f"range=[{float(self.min_val):.4g}, {float(self.max_val):.4g}]"
        return f"num_bits={self.num_bits}, {form}, {limits}, scale={float(self.scale):.4g}, zero_point={int(self.zero_point)}{state}"


class WeightQuantizer(nn.Module):
    """Fake-quantizes a weight with scales from its own largest magnitudes, symmetric, computed anew from the weight.

    Without gradients the result is kept until the weight changes.

    Args:
        num_bits: 2 to 8.
        axis: Axis of the output channels; `None`: one scale for the whole tensor.
    """

    def __init__(self, num_bits: int = 8, axis: int | None = 0) -> None:
        super().__init__()
        self.num_bits, self.axis = num_bits, axis
        self._kept: tuple[weakref.ref[Tensor], tuple[int, int], Tensor] | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantize; the gradient is that of the identity."""
        if torch.compiler.is_compiling() or weight.is_inference():
            return fake_quantize_weight(weight, self.num_bits, self.axis)
        if torch.is_grad_enabled():
            # What training is about to change is not kept: writing through ``.data`` would leave no trace.
            self._kept = None
            return fake_quantize_weight(weight, self.num_bits, self.axis)
        # A computed weight (a parametrization) is a new tensor each time, often at the address of the last one: only the owner tells them apart.
        owner = weight._base if weight._base is not None else weight
        version = (weight.data_ptr(), weight._version)
        kept = self._kept
        if kept is None or kept[0]() is not owner or kept[1] != version or kept[2].shape != weight.shape or kept[2].device != weight.device:
            kept = self._kept = weakref.ref(owner), version, fake_quantize_weight(weight, self.num_bits, self.axis)
        return kept[2]

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The integers themselves.

        Returns:
            int8 of the weight's shape, and the scale as `weight_scale` shapes it.
        """
        scale = weight_scale(weight, self.num_bits, self.axis)
        low, high = quant_range(self.num_bits, symmetric=True)
        return weight.detach().float().div(scale).round().clamp(low, high).to(torch.int8), scale

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with nothing kept."""
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        """Bits and axis."""
        return f"num_bits={self.num_bits}, axis={self.axis}"


@torch.no_grad()
def sync_ranges(quantizers: Sequence[ActivationQuantizer], calibrating: bool = False) -> None:
    """Make ranges equal on all ranks by one reduction for all of them; nothing happens on a single process.

    Min-max ranges take the smallest and the largest of the ranks. Others take the mean, and the union while the ``mse`` estimator calibrates.

    Args:
        quantizers: The same ones in the same order on every rank.
        calibrating: Whether a calibration is about to finish: evidence of NaN and infinity is shared too.
    """
    if not quantizers or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    bounds = torch.stack([*(-q.min_val for q in quantizers), *(q.max_val for q in quantizers)])
    if quantizers[0].estimator == "min_max" or (calibrating and quantizers[0].estimator == "mse"):
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    else:
        dist.all_reduce(bounds)
        bounds /= dist.get_world_size()
    flags = torch.stack([q.non_finite for q in quantizers]).float()
    if calibrating:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    for number, quantizer in enumerate(quantizers):
        quantizer.min_val.copy_(-bounds[number])
        quantizer.max_val.copy_(bounds[len(quantizers) + number])
        if calibrating:
            quantizer.non_finite.copy_(flags[number] > 0)
        else:
            quantizer.refresh()
