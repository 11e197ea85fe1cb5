"""What passed a quantizer, as people look at it: the range, the grid, and a histogram in steps of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.qparams import quant_range
from lightning_cco.quantization.weight_quantizer import WeightQuantizer

BINS = 48
_MOST_VALUES = 8_192


@dataclass(frozen=True)
class Histogram:
    """How many of some values, evenly drawn from a tensor, are in each of `BINS` intervals of one width.

    Attributes:
        low: Where the first interval begins.
        high: Where the last one ends.
        counts: Values in each; empty where there was nothing finite to count.
    """

    low: float = math.nan
    high: float = math.nan
    counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class WeightView:
    """The weights of a layer.

    Attributes:
        num_bits: Bits of their levels.
        elements: How many they are.
        channels: How many scales they have.
        low: Smallest weight.
        high: Largest weight.
        smallest_scale: Smallest step of a channel.
        largest_scale: Largest step of a channel.
        histogram: Of the weights in steps of their own channel's scale: levels are whole numbers.
        levels: The first and the last one, in steps; of weights with zero points those furthest from 0 in any group.
    """

    num_bits: int
    elements: int
    channels: int
    low: float
    high: float
    smallest_scale: float
    largest_scale: float
    histogram: Histogram
    levels: tuple[float, float]


@dataclass(frozen=True)
class ActivationView:
    """A rounded tensor.

    Attributes:
        num_bits: Bits of its levels.
        symmetric: Whether the zero point must be 0.
        low: Smallest value of the range that its levels were made for.
        high: Largest value of that range.
        scale: Step between two levels.
        zero_point: Level of 0.
        histogram: Of the values themselves, after the clamp that is folded into the rounding.
    """

    num_bits: int
    symmetric: bool
    low: float
    high: float
    scale: float
    zero_point: float
    histogram: Histogram


@dataclass
class TensorViews:
    """The views of one forward.

    Attributes:
        weights: By layer; of several weights of one, the first with the histogram of all.
        activations: By the name of the tensor's quantizer; of several calls the last.
    """

    weights: dict[str, WeightView] = field(default_factory=dict)
    activations: dict[str, ActivationView] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)

    @torch.no_grad()
    def see_weight(self, name: str, quantizer: WeightQuantizer, weight: Tensor, steps: Tensor) -> None:
        """Look at a weight.

        Args:
            name: Its layer.
            quantizer: Its quantizer.
            weight: The weight.
            steps: The scale of each weight, in a shape that goes together with the weight's.
        """
        weight = weight.detach()
        if not weight.numel() or id(quantizer) in self._seen:  # called once more in the same forward
            return
        self._seen.add(id(quantizer))
        in_steps = _drawn(weight).float() / _drawn(steps.expand_as(weight)).float()
        low, high = weight.aminmax()
        first, last = (torch.as_tensor(bound) for bound in quantizer.levels(weight))
        found = WeightView(
            quantizer.num_bits,
            weight.numel(),
            quantizer.scales_of(weight),
            float(low),
            float(high),
            float(steps.amin()),
            float(steps.amax()),
            histogram(in_steps),
            (float(first.amin()), float(last.amax())),
        )
        before = self.weights.get(name)
        self.weights[name] = found if before is None else _joined(before, found)

    @torch.no_grad()
    def see_activation(self, name: str, quantizer: ActivationQuantizer, values: Tensor) -> None:
        """Look at what enters a rounding.

        Args:
            name: The quantizer's name.
            quantizer: The quantizer.
            values: After the clamp that is folded into it.
        """
        low, high, scale, zero_point = torch.stack([quantizer.min_val, quantizer.max_val, quantizer.scale, quantizer.zero_point]).tolist()
        self.activations[name] = ActivationView(
            quantizer.num_bits, quantizer.symmetric, low, high, scale, zero_point, histogram(_drawn(values).float())
        )


def histogram(values: Tensor) -> Histogram:
    """Count finite values.

    >>> histogram(torch.tensor([0.0, 48.0, float("nan")])).counts[:2]
    (1, 0)
    """
    array = values.detach().cpu().numpy()
    array = array[np.isfinite(array)]
    if not array.size:
        return Histogram()
    low, high = float(array.min()), float(array.max())
    if not low < high:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    places = ((array.astype(np.float64) - low) * (BINS / (high - low))).astype(np.int64).clip(0, BINS - 1)
    return Histogram(low, high, tuple(np.bincount(places, minlength=BINS).tolist()))


def levels(num_bits: int, symmetric: bool, scale: float = 1.0, zero_point: float = 0.0) -> tuple[float, float]:
    """The first and the last level as values.

    >>> levels(8, symmetric=True), levels(2, symmetric=False, scale=0.5, zero_point=1.0)
    ((-127.0, 127.0), (-0.5, 1.0))
    """
    low, high = quant_range(num_bits, symmetric)
    return (low - zero_point) * scale, (high - zero_point) * scale


def _drawn(values: Tensor) -> Tensor:
    """At most about 8,192 of the values, evenly spread; an odd stride, so that it does not stay within one channel."""
    flat = values.reshape(-1)
    return flat[:: max(1, -(-flat.numel() // _MOST_VALUES)) | 1]


def _joined(first: WeightView, second: WeightView) -> WeightView:
    """Two weights of one layer, such as a recurrent one's."""
    return WeightView(
        first.num_bits,
        first.elements + second.elements,
        first.channels + second.channels,
        min(first.low, second.low),
        max(first.high, second.high),
        min(first.smallest_scale, second.smallest_scale),
        max(first.largest_scale, second.largest_scale),
        _added([first.histogram, second.histogram]),
        (min(first.levels[0], second.levels[0]), max(first.levels[1], second.levels[1])),
    )


def _added(histograms: Sequence[Histogram]) -> Histogram:
    """Several in one, each interval's values where its middle is."""
    known = [one for one in histograms if one.counts]
    if not known:
        return Histogram()
    low, high = min(one.low for one in known), max(one.high for one in known)
    counts = [0] * BINS
    for one in known:
        for place, count in enumerate(one.counts):
            middle = one.low + (place + 0.5) / BINS * (one.high - one.low)
            counts[min(BINS - 1, int((middle - low) / (high - low) * BINS))] += count
    return Histogram(low, high, tuple(counts))
