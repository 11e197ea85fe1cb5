"""A plain fake-quantizer to compare with: PyTorch's own operators, one step after the other, nothing folded, fused, kept or approximated."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_cco import QuantizedModel
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.weight_quantizer import WeightQuantizer

_SMALLEST_SCALE = 1e-12


class Plain:
    """Makes a quantized model compute as a textbook would, with the same plan: only the arithmetic differs.

    The activation's clamp is an operation of its own, `torch.fake_quantize_per_tensor_affine` rounds, its own gradient passes where nothing is clipped;
    weights go through `torch.fake_quantize_per_channel_affine`; ranges follow the whole batch by an exponential moving average.

    Args:
        quantized: A calibrated model.
        moving: Whether the ranges follow the batches.
    """

    def __init__(self, quantized: QuantizedModel, moving: bool) -> None:
        self.moving = moving
        # The library's own ranges stay as calibration left them.
        quantized.freeze_ranges()
        for quantizer in quantized.activations.values():
            quantizer.forward = _Activation(quantizer, self)  # type: ignore[method-assign]
        for quantizers in quantized.weights.values():
            for weight_quantizer in quantizers:
                weight_quantizer.forward = _Weight(weight_quantizer)  # type: ignore[method-assign]


class _Activation:
    def __init__(self, quantizer: ActivationQuantizer, plain: Plain) -> None:
        self.quantizer, self.plain = quantizer, plain
        self.low, self.high = float(quantizer.min_val), float(quantizer.max_val)
        # Where the range moves to before the next forward.
        self.next = self.low, self.high

    def __call__(self, x: Tensor, clamp: tuple[float, float] | None = None, inplace: bool = False, track: bool = False, **_: Any) -> Tensor:
        result = x.clone() if inplace else x
        if clamp is not None:
            result = F.relu(result) if clamp == (0.0, float("inf")) else F.hardtanh(result, *clamp)
        self.low, self.high = self.next
        if track and self.plain.moving:
            share = self.quantizer.averaging_constant
            low, high = (float(end) for end in result.detach().aminmax())
            self.next = self.low + share * (low - self.low), self.high + share * (high - self.high)
        result = torch.fake_quantize_per_tensor_affine(result, *self.grid())
        return x.copy_(result) if inplace else result

    def grid(self) -> tuple[float, int, int, int]:
        """Scale, zero point, first and last level of a range that contains 0."""
        low, high, bits = min(self.low, 0.0), max(self.high, 0.0), self.quantizer.num_bits
        if self.quantizer.symmetric:
            limit = 2 ** (bits - 1) - 1
            return max(max(-low, high) / limit, _SMALLEST_SCALE), 0, -limit, limit
        last = 2**bits - 1
        scale = max((high - low) / last, _SMALLEST_SCALE)
        return scale, min(max(round(-low / scale), 0), last), 0, last


class _Weight:
    def __init__(self, quantizer: WeightQuantizer) -> None:
        self.quantizer = quantizer

    def __call__(self, weight: Tensor, **_: Any) -> Tensor:
        limit, axis = 2 ** (self.quantizer.num_bits - 1) - 1, self.quantizer.axis
        magnitudes = weight.detach().abs()
        if axis is None:
            scale = float(magnitudes.max()) / limit
            return torch.fake_quantize_per_tensor_affine(weight, max(scale, _SMALLEST_SCALE), 0, -limit, limit)
        others = [dim for dim in range(weight.dim()) if dim != axis]
        scales = magnitudes.amax(others).div(limit).clamp(min=_SMALLEST_SCALE)
        zero_points = torch.zeros_like(scales, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scales, zero_points, axis, -limit, limit)
