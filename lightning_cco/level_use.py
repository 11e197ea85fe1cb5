"""How the levels of few bits are used: which shares of weights and activations are clipped, and which weights go to and fro between levels.

A weight oscillates when it left its level of two epochs ago and is on it again: the gradient drives it over the border between two levels and back.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_cco.errors import CCOWarning
from lightning_cco.graph.compiled import eager
from lightning_cco.names import printable
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.qparams import quant_range
from lightning_cco.quantization.weight_quantizer import WeightQuantizer
from lightning_cco.tensor_views import TensorViews

_MOST_VALUES = 65_536
_TOO_MANY = 0.25
"""From this share on a range no longer fits: of four levels the best for a normal distribution leave a twentieth beyond them."""
_NAMED = 5


@dataclass(frozen=True)
class LayerLevels:
    """One layer's shares, from 0 to 1; NaN where there is nothing to count.

    Attributes:
        clipped_weights: Weights beyond the outermost levels, by more than half a step.
        oscillating_weights: Weights on the level of two epochs ago that were on another one in between; NaN in the first two epochs.
        clipped_activations: The same of what enters the rounding of the layer's output.
    """

    clipped_weights: float = math.nan
    oscillating_weights: float = math.nan
    clipped_activations: float = math.nan


class LevelWatch:
    """Looks at the levels once an epoch, on the same batch; keeps those of the two epochs before.

    Of tensors with more than 65,536 values that many are looked at, the same ones each time.

    Attributes:
        views: What passed the quantizers when it looked last.
    """

    def __init__(self) -> None:
        self.views = TensorViews()
        self._before: tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]] = {}, {}

    def measure(self, quantized: HookedModel, forward: Callable[[], Any]) -> dict[str, LayerLevels]:
        """Look at one forward.

        Args:
            quantized: A calibrated model.
            forward: Runs a batch through it.

        Returns:
            What was seen by layer, or by tensor where it is not a layer's first output.
        """
        views = self.views = TensorViews()
        weights: dict[str, list[tuple[float, int, Tensor]]] = {}
        activations: dict[str, list[tuple[float, int]]] = {}
        with ExitStack() as stack:
            for name, quantizers in quantized.weights.items():
                for one in quantizers:
                    handle = one.register_forward_pre_hook(_see_weight(weights.setdefault(name, []), name, views))
                    stack.callback(handle.remove)
            for key, quantizer in quantized.activations.items():
                handle = quantizer.register_forward_pre_hook(
                    _see_activation(activations.setdefault(str(key), []), str(key), views), with_kwargs=True
                )
                stack.callback(handle.remove)
            with quantized.evaluating(), quantized.forked_random(), eager():
                forward()
        levels = {name: [integers for _, _, integers in seen] for name, seen in weights.items()}
        found = {}
        for name in dict.fromkeys([*weights, *activations]):
            seen = weights.get(name, [])
            found[name] = LayerLevels(
                _share((clipped, count) for clipped, count, _ in seen),
                _oscillating(levels.get(name, []), self._before[1].get(name, []), self._before[0].get(name, [])),
                _share(activations.get(name, [])),
            )
        self._before = self._before[1], levels
        return found


def _see_weight(seen: list[tuple[float, int, Tensor]], name: str, views: TensorViews) -> Callable[..., None]:
    def see(quantizer: WeightQuantizer, args: tuple[Any, ...]) -> None:
        with torch.no_grad():
            weight = args[0].detach()
            integers, _ = quantizer.quantize(weight)
            steps, (first, last) = quantizer.steps(weight), quantizer.levels(weight)
            beyond = _some((weight < (first - 0.5) * steps) | (weight > (last + 0.5) * steps))
            seen.append((float(beyond.sum()), beyond.numel(), _some(integers).cpu()))
            views.see_weight(name, quantizer, weight, steps)

    return see


def _see_activation(seen: list[tuple[float, int]], name: str, views: TensorViews) -> Callable[..., None]:
    def see(quantizer: ActivationQuantizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            values = _some(args[0].detach()).float()
            if kwargs.get("clamp") is not None:
                values = values.clamp(*kwargs["clamp"])
            low, high = quant_range(quantizer.num_bits, quantizer.symmetric)
            beyond = (values < (low - quantizer.zero_point - 0.5) * quantizer.scale) | (
                values > (high - quantizer.zero_point + 0.5) * quantizer.scale
            )
            seen.append((float(beyond.sum()), beyond.numel()))
            views.see_activation(name, quantizer, values)

    return see


def _some(values: Tensor) -> Tensor:
    """At most about 65,536 of the values, evenly spread."""
    flat = values.reshape(-1)
    return flat[:: max(1, -(-flat.numel() // _MOST_VALUES))]


def _share(parts: Iterable[tuple[float, int]]) -> float:
    counted = list(parts)
    total = sum(count for _, count in counted)
    return sum(part for part, _ in counted) / total if total else math.nan


def _oscillating(now: list[Tensor], before: list[Tensor], long_before: list[Tensor]) -> float:
    if (
        not now
        or [one.shape for one in now] != [one.shape for one in before]
        or [one.shape for one in now] != [one.shape for one in long_before]
    ):
        return math.nan
    triples = list(zip(now, before, long_before, strict=True))
    return _share((float(((a == c) & (a != b)).sum()), a.numel()) for a, b, c in triples)


def worst_first(levels: Mapping[str, LayerLevels]) -> list[tuple[str, LayerLevels]]:
    """Layers from the largest share of any kind on."""

    def largest(shares: LayerLevels) -> float:
        return max((share for share in vars(shares).values() if not math.isnan(share)), default=0.0)

    return sorted(levels.items(), key=lambda item: -largest(item[1]))


def warn_of_clipped(levels: Mapping[str, LayerLevels], quantized: HookedModel) -> None:
    """Say at the end of a training which ranges have stayed behind: those that do not follow it, and of whose values a quarter and more are clipped.

    Args:
        levels: What was seen in the last epoch.
        quantized: The model.
    """
    fixed = {str(key) for key, quantizer in quantized.activations.items() if quantizer.frozen or quantizer.settled}
    found = [
        f"'{printable(name)}' ({100 * shares.clipped_activations:.0f} %)"
        for name, shares in sorted(levels.items(), key=lambda item: -item[1].clipped_activations)
        if name in fixed and shares.clipped_activations >= _TOO_MANY
    ]
    if found:
        warnings.warn(
            f"trainer.fit: activations are clipped in {', '.join(found[:_NAMED])}{f' and {len(found) - _NAMED} more' if len(found) > _NAMED else ''}: "
            "their ranges stayed as the calibration found them, and the values have grown since. Let ranges follow the training (training_settings: "
            "{range_estimator: moving_average}), or calibrate once it has settled (training_settings: {start_at_step: 1000}).",
            CCOWarning,
            stacklevel=3,
        )
