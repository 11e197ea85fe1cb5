"""Integer weights for a file, with batch norms folded into them exactly.

``BN(conv(x, s·q) + b) = conv(x, (f·s)·q) + f·(b − mean) + beta`` with ``f = gamma / sqrt(var + eps)``: the per-channel scale takes the factor, the integers
stay. A negative factor flips the integers' signs, since scales are positive.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_cco._values import GROUP_SIZES
from lightning_cco.export.errors import ExportError
from lightning_cco.quantization.model import HookedModel


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as an engine stores it.

    Attributes:
        integers: int8 (uint8 where an engine wants the type of its activations), the weight's shape.
        scale: float32; 1-d along ``axis``, or 0-d; of weights in groups as many dimensions as the integers, the size of ``axis`` being that of the groups.
        axis: Axis of the channels, or that which is cut into groups; `None`: one scale.
        bias: Bias of the layer after folding, float32, 1-d; `None`: none, or left as it is.
        folded: Name of the batch norm layer folded in, if any.
        zero_point: The zero point; `shifted` changes it.
        zero_points: A zero point for each scale, of the type of the integers; `None`: ``zero_point`` for all.
        group: How many weights along ``axis`` share a scale; `None`: those of a channel.
    """

    integers: Tensor
    scale: Tensor
    axis: int | None
    bias: Tensor | None
    folded: str | None = None
    zero_point: int = 0
    group: int | None = None
    zero_points: Tensor | None = None

    def shifted(self, zero_point: int, dtype: torch.dtype) -> IntegerWeight:
        """The same values on a range with another zero point."""
        moved = self.integers.to(torch.int16) + (zero_point - self.zero_point)
        return replace(self, integers=moved.to(dtype), zero_point=zero_point)


def batch_norm_after(quantized: HookedModel, name: str) -> str | None:
    """The batch norm that belongs to the group of a weighted layer, if there is one."""
    after = quantized.plan.groups.get(name)
    return after if after is not None and quantized.graph[after].kind == "batch_norm" else None


@torch.no_grad()
def integer_weight(
    quantized: HookedModel, name: str, weight: Tensor, bias: Tensor | None, number: int = 0, norm: tuple[str, BatchNorm] | None = None
) -> IntegerWeight:
    """Quantize one weight of a layer, with the batch norm after it folded in.

    Args:
        quantized: The model.
        name: The layer.
        weight: Its weight as the layer sees it.
        bias: Its bias, if any.
        number: Which of the layer's weights.
        norm: The batch norm after it, by name, and what it computes with.

    Raises:
        ExportError: It can't be folded.
    """
    quantizer = quantized.weights[name][number]
    integers, scale = quantizer.quantize(weight)
    if quantizer.in_rows:  # computed in float: no batch norm goes into it
        bias = bias.detach().float() if bias is not None else None
        return _in_blocks(integers, scale, quantizer.zero_points(weight), quantizer.blocks or 0, bias)
    scale = scale.flatten() if quantizer.axis is not None else scale.reshape(())
    bias = bias.detach().float() if bias is not None else None
    if norm is None:
        return IntegerWeight(integers, scale, quantizer.axis, bias)
    factor, shift = norm[1].factor_and_shift()
    axis = quantizer.axis or 0
    groups = factor.numel() // integers.shape[axis]
    if groups > 1:  # a grouped transposed convolution shares the scale of a channel between groups; the factor does not
        raise ExportError(
            f"layer '{name}' is a grouped transposed convolution with a batch norm, which can't be folded. "
            f"Skip it: {{match: {name}, skip_quantization: true}}."
        )
    shape = [1] * integers.dim()
    shape[axis] = -1
    integers = integers * torch.where(factor < 0, -1, 1).to(torch.int8).reshape(shape)
    # A factor of 0 would make a scale that engines refuse; the channel is its shift alone.
    dead = factor == 0
    integers = integers * (~dead).to(torch.int8).reshape(shape)
    scale = torch.where(dead, scale, scale * factor.abs())
    return IntegerWeight(integers, scale, quantizer.axis, (bias * factor if bias is not None else 0.0) + shift, norm[0])


def _in_blocks(integers: Tensor, scale: Tensor, zero_points: Tensor | None, axis: int, bias: Tensor | None) -> IntegerWeight:
    """A matrix cut into groups along an axis, of a size that engines have: a whole channel is several with the same scale and zero point."""
    inputs, groups = integers.shape[axis], scale.shape[axis]
    size = inputs // groups
    if size not in GROUP_SIZES:
        size = next((known for known in reversed(GROUP_SIZES) if size % known == 0), size)
        repeats = inputs // size // groups
        scale = scale.repeat_interleave(repeats, axis)
        zero_points = None if zero_points is None else zero_points.repeat_interleave(repeats, axis)
    return IntegerWeight(integers, scale, axis, bias, group=size, zero_points=zero_points)


@torch.no_grad()
def norm_weight(norm: BatchNorm) -> IntegerWeight:
    """A batch norm as a convolution of each channel with one number, which a scale for each channel makes exact: (C, 1) integers, and its shift as bias."""
    factor, shift = norm.factor_and_shift()
    dead = factor == 0
    integers = torch.where(dead, 0, torch.where(factor < 0, -127, 127)).to(torch.int8)
    scale = torch.where(dead, 1.0, factor.abs() / 127)
    return IntegerWeight(integers.reshape(-1, 1), scale, 0, shift)


@dataclass(frozen=True)
class BatchNorm:
    """What a batch norm with running statistics computes with; each (C,)."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of_call(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchNorm:
        """From the arguments of `torch.nn.functional.batch_norm`."""
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        return cls(call["running_mean"], call["running_var"], call.get("weight"), call.get("bias"), call.get("eps", 1e-5))

    def factor_and_shift(self) -> tuple[Tensor, Tensor]:
        """``y = factor · x + shift`` in float32."""
        factor = (self.variance + self.eps).rsqrt()
        factor = factor * self.weight if self.weight is not None else factor
        shift = -self.mean * factor + (self.bias if self.bias is not None else 0.0)
        return factor.detach().float(), shift.detach().float()
