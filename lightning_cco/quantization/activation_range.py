"""The range of an activation: found in a calibration, frozen, saved; scale and zero point follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cco.quantization.async_reads import LateRead
from lightning_cco.quantization.qparams import affine_qparams
from lightning_cco.quantization.ranges import (
    FEW_BITS,
    batch_range,
    best_clip_ratio,
    clip_errors,
    clip_ratios,
    percentile_range,
    range_estimator,
    sample,
    says_something,
)
from lightning_cco.quantization.tracing import behind_transforms, reads_at_once, runs_plainly

_RANGE_BUFFERS = ("min_val", "max_val", "scale", "zero_point", "clip_ratio")
_INF = float("inf")


class ActivationRange(nn.Module):
    """The range of one activation tensor, with one scale and zero point.

    In training the quantizer notes the smallest and the largest value that pass; `update_ranges` lets the ranges of all quantizers follow, once per step.
    With ``auto`` at few bits the range is frozen once the calibration has found it: what is learned at few bits is learned for one grid.
    Zeros and empty tensors say nothing about a range. As long as nothing else has come, values pass unrounded; the first batch that says something is
    then taken as it is.
    Buffers are written in place, never assigned: a buffer assigned under ``trainer.validate`` would be an inference tensor for good.

    Args:
        num_bits: 2 to 8.
        symmetric: Whether the zero point is 0.
        estimator: ``moving_average``, ``min_max``, ``percentile`` or ``mse``; ``auto``: ``mse`` up to 4 bits, ``moving_average`` above.
        averaging_constant: Share of a training batch's range in the moving average.
        percentile: For the ``percentile`` estimator: 99.99 clips 0.01 % of the values at each end.

    Attributes:
        estimator: Which one it is; never ``auto``.
        frozen: Whether the range stays as it is, as long as nobody says otherwise.
        settles: Whether the range is frozen once a calibration has found it.
        settled: Whether it does now. What the calibration says nothing about follows the training instead.
        empty: Whether nothing has said anything about the range yet.
        observed: How many calibration batches did.
        widths: Of a tensor that its readers round: how wide the values are that each of them gets, or passes on as its outputs.
        saw_zeros: Whether zeros came in the calibration.
        batch_widths: Of each calibration batch that said something, how wide its values are, 0 included.
        min_val, max_val: The range, 0-d float32.
        scale, zero_point: What follows from it, 0-d float32.
        extrema: Smallest and largest value that passed in training since the range last moved, float32 of 2; infinite if nothing did.
        clip_ratio: Factor of the range that the ``mse`` estimator found.
    """

    min_val: Tensor
    max_val: Tensor
    scale: Tensor
    zero_point: Tensor
    clip_ratio: Tensor
    extrema: Tensor
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
        self.num_bits, self.symmetric = num_bits, symmetric
        self.settles = estimator == "auto" and num_bits <= FEW_BITS
        self.estimator = range_estimator(estimator, num_bits)
        self.settled = False
        self.averaging_constant, self.percentile = averaging_constant, percentile
        self.frozen = False
        self.empty = True
        self.observed = 0
        self.saw_zeros = False
        self.widths: dict[tuple[str, int], Tensor] = {}
        self.batch_widths: list[Tensor] = []
        # The calibration batch that was observed last: its number, its range, and the range before it.
        self._batch: int | None = None
        self._batch_range: tuple[Tensor, Tensor] | None = None
        self._range_before: tuple[Tensor, Tensor] | None = None
        self._samples: list[Tensor] = []
        self._asked: LateRead | None = None  # whether the range said something in the last step
        # Type and device by name: under bf16-true the Trainer makes another type the default, and so may the user.
        starts: dict[str, Any] = {**dict.fromkeys(_RANGE_BUFFERS, 0.0), "scale": 1.0, "clip_ratio": 1.0, "extrema": [_INF, -_INF]}
        for name, start in starts.items():
            self.register_buffer(name, torch.tensor(start, dtype=torch.float32, device="cpu"))
        self.register_buffer("non_finite", torch.zeros((), dtype=torch.bool, device="cpu"))

    @property
    def kind(self) -> tuple[Any, ...]:
        """What a range is of: one of another kind can't be taken over."""
        return self.num_bits, self.symmetric, self.estimator, self.settles

    def start_calibration(self) -> None:
        """Forget what was observed before."""
        self.settled = False
        self.observed = 0
        self.saw_zeros = False
        self.widths = {}
        self.batch_widths = []
        self._batch = self._batch_range = self._range_before = None
        self._samples.clear()
        self.non_finite.zero_()
        self.clip_ratio.fill_(1.0)

    @torch.no_grad()
    def see_read(self, layer: str, values: Sequence[Tensor]) -> None:
        """Note how wide the values are that one of the readers gets in the calibration: it may read a slice."""
        if not runs_plainly():
            return
        for number, part in enumerate(values):
            if part.numel() and part.is_floating_point():
                low, high = batch_range(part)
                width, key = high.clamp(min=0.0) - low.clamp(max=0.0), (layer, number)
                self.widths[key] = torch.maximum(width, self.widths[key]) if key in self.widths else width

    @torch.no_grad()
    def observe(self, x: Tensor, batch: int | None = None) -> None:
        """Widen or average the range by a calibration batch, if that says anything.

        Args:
            x: The float activation, any shape.
            batch: Number of the batch: what comes with the same number counts as one tensor.
        """
        if not runs_plainly():
            with behind_transforms(x) as values:
                if values is not None:
                    self._observe(values, batch)
            return
        self._observe(x, batch)

    def _observe(self, x: Tensor, batch: int | None) -> None:
        if x.numel() == 0:
            return
        low, high = self._range_of(x)
        self.non_finite.logical_or_(~torch.isfinite(high - low))
        if bool((low == 0) & (high == 0)):
            self.saw_zeros = True
            return
        if batch is not None and batch == self._batch and self._batch_range is not None:
            low, high = torch.minimum(low, self._batch_range[0]), torch.maximum(high, self._batch_range[1])
            self.batch_widths.pop()
        else:
            self._range_before = self.min_val.clone(), self.max_val.clone()
            self.observed += 1
        self._batch, self._batch_range = batch, (low, high)
        self.batch_widths.append(high.clamp(min=0.0) - low.clamp(max=0.0))
        if self.estimator == "mse":
            self._samples.append(sample(x))
        assert self._range_before is not None
        before_min, before_max = self._range_before
        if self.estimator in ("min_max", "mse") and self.observed > 1:
            low, high = torch.minimum(before_min, low), torch.maximum(before_max, high)
        elif self.observed > 1:  # the plain mean over the calibration batches
            low, high = torch.lerp(before_min, low, 1.0 / self.observed), torch.lerp(before_max, high, 1.0 / self.observed)
        self.min_val.copy_(low)
        self.max_val.copy_(high)

    @torch.no_grad()
    def clip_errors(self) -> Tensor:
        """What the ``mse`` estimator compares (`ranges.clip_errors`) on the samples of this process; zeros without any."""
        if not self._samples:
            return torch.zeros_like(clip_ratios(self.min_val.device), dtype=torch.float64)
        return clip_errors(torch.cat(self._samples), self.min_val, self.max_val, self.num_bits, self.symmetric)

    @torch.no_grad()
    def finish_calibration(self, errors: Tensor | None = None) -> str:
        """Turn what was observed into a scale.

        Args:
            errors: `clip_errors` of all processes together; `None`: this process's own.

        Returns:
            ``ok``, ``never_observed`` (nothing came, or empty tensors alone) or ``non_finite`` (a NaN or an infinity came).
        """
        if bool(self.non_finite):
            return "non_finite"
        if self.estimator == "mse" and self.observed:
            errors = self.clip_errors() if errors is None else errors
            self.clip_ratio.copy_(best_clip_ratio(errors))
            self.min_val.mul_(self.clip_ratio)
            self.max_val.mul_(self.clip_ratio)
            self._samples.clear()
        self.refresh()
        self.settled = self.settles and not self.empty
        return "ok" if self.observed or self.saw_zeros else "never_observed"

    def _range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return percentile_range(x, self.percentile) if self.estimator == "percentile" else batch_range(x)

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute scale and zero point from the range."""
        scale, zero_point = affine_qparams(self.min_val, self.max_val, self.num_bits, self.symmetric)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.notice()

    def notice(self) -> None:
        """Look whether the range says something now."""
        self._asked = None
        self.empty = not bool(says_something(self.min_val, self.max_val))

    def notice_in_training(self) -> None:
        """The same without waiting for a device: there, what the last look has shown."""
        if reads_at_once(self.min_val.device):
            self.notice()
            return
        if self._asked is not None:
            self.empty = not bool(self._asked.value())
        self._asked = LateRead(says_something(self.min_val, self.max_val)) if self.empty else None

    @property
    def fixed(self) -> bool:
        """Whether the range does not follow the training: it is frozen, or settled by its estimator."""
        return self.frozen or self.settled

    def freeze(self) -> None:
        """Keep the range as it is from now on."""
        self.frozen = True
        self.forget_batch()

    def forget_batch(self) -> None:
        """Drop what passed since the range last moved."""
        self.extrema[0].fill_(_INF)
        self.extrema[1].fill_(-_INF)

    def unfreeze(self) -> None:
        """Let the range follow the activations again, also one that had settled."""
        self.frozen = self.settled = False

    def get_ranges(self) -> dict[str, Any]:
        """The range as plain data for a checkpoint."""
        return {
            "num_bits": self.num_bits,
            "settled": self.settled,
            **{name: getattr(self, name).detach().clone().cpu() for name in _RANGE_BUFFERS},
        }

    @torch.no_grad()
    def set_ranges(self, ranges: Mapping[str, Any]) -> None:
        """Take a range over, to the last bit if it is of the same number of bits."""
        for name in _RANGE_BUFFERS:
            getattr(self, name).copy_(ranges[name])
        self.observed = max(1, self.observed)
        self.settled = self.settles and bool(ranges.get("settled", False))  # ranges of older versions follow the training
        self.forget_batch()
        self.notice()
        if ranges["num_bits"] != self.num_bits:
            self.refresh()

    def extra_repr(self) -> str:
        """Bits, format, range and scale."""
        form = "symmetric" if self.symmetric else "affine"
        state = ", frozen" if self.frozen else ", settled" if self.settled else ""
        limits = f"range=[{float(self.min_val):.4g}, {float(self.max_val):.4g}]"
        return f"num_bits={self.num_bits}, {form}, {limits}, scale={float(self.scale):.4g}, zero_point={int(self.zero_point)}{state}"
