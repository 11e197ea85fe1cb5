"""Integer weights for a file, with batch norms and constants of channels folded into them exactly.

``f·(conv(x, s·q) + b) + c = conv(x, (f·s)·q) + f·b + c``: the per-channel scale takes the factor, the integers stay. Of a batch norm
``f = gamma / sqrt(var + eps)`` and ``c = beta − f·mean``. A negative factor flips the integers' signs, since scales are positive.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_cco._values import GROUP_SIZES
from lightning_cco.export.errors import ExportError
from lightning_cco.graph.captured import CallSite
from lightning_cco.graph.channel_constants import constant_of, factor_and_shift
from lightning_cco.quantization.model import HookedModel


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as an engine stores it.

    Attributes:
        integers: int8 (uint8 where an engine wants the type of its activations), the weight's shape.
        scale: float32; 1-d along ``axis``, or 0-d; of weights in groups as many dimensions as the integers, the size of ``axis`` being that of the groups.
        axis: Axis of the channels, or that which is cut into groups; `None`: one scale.
        bias: Bias of the layer after folding, float32, 1-d; `None`: none, or left as it is.
        folded: Names of the layers folded in, in their order.
        zero_point: The zero point; `shifted` changes it.
        zero_points: A zero point for each scale, of the type of the integers; `None`: ``zero_point`` for all.
        group: How many weights along ``axis`` share a scale; `None`: those of a channel.
    """

    integers: Tensor
    scale: Tensor
    axis: int | None
    bias: Tensor | None
    folded: tuple[str, ...] = ()
    zero_point: int = 0
    group: int | None = None
    zero_points: Tensor | None = None

    def shifted(self, zero_point: int, dtype: torch.dtype) -> IntegerWeight:
        """The same values on a range with another zero point."""
        moved = self.integers.to(torch.int16) + (zero_point - self.zero_point)
        return replace(self, integers=moved.to(dtype), zero_point=zero_point)


@torch.no_grad()
def integer_weight(
    quantized: HookedModel, name: str, weight: Tensor, bias: Tensor | None, number: int = 0, after: dict[str, Affine] | None = None
) -> IntegerWeight:
    """Quantize one weight of a layer, with what is computed after it folded in.

    Args:
        quantized: The model.
        name: The layer.
        weight: Its weight as the layer sees it.
        bias: Its bias, if any.
        number: Which of the layer's weights.
        after: The layers that fold into it, by name, in their order.

    Raises:
        ExportError: They can't be folded.
    """
    quantizer = quantized.weights[name][number]
    integers, scale = quantizer.quantize(weight)
    if quantizer.in_rows:  # computed in float: nothing goes into it
        bias = bias.detach().float() if bias is not None else None
        return _in_blocks(integers, scale, quantizer.zero_points(weight), quantizer.blocks or 0, bias)
    scale = scale.flatten() if quantizer.axis is not None else scale.reshape(())
    bias = bias.detach().float() if bias is not None else None
    if not after:
        return IntegerWeight(integers, scale, quantizer.axis, bias)
    factor, shift = folded(after.values())
    axis = quantizer.axis or 0
    if factor.numel() == 1:
        factor = factor.expand(integers.shape[axis])
    # A grouped transposed convolution shares the scale of a channel between groups; the factor does not.
    if factor.numel() > integers.shape[axis]:
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
    bias = bias * factor if bias is not None else None
    if shift is not None:
        bias = shift.expand_as(factor).clone() if bias is None else bias + shift
    return IntegerWeight(integers, scale, quantizer.axis, bias, tuple(after))


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
    factor, shift = norm.factor_and_shift(torch.float32)
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

    def factor_and_shift(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``y = factor · x + shift``, computed in a data type."""
        mean, variance = self.mean.detach().to(dtype), self.variance.detach().to(dtype)
        factor = (variance + self.eps).rsqrt()
        factor = factor * self.weight.detach().to(dtype) if self.weight is not None else factor
        return factor, -mean * factor + (self.bias.detach().to(dtype) if self.bias is not None else 0.0)


@dataclass(frozen=True)
class ChannelConstant:
    """What a multiplication by a constant with one value for each channel, or for all, computes with; or an addition."""

    kind: str
    constant: Tensor

    def factor_and_shift(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """``y = factor · x + shift``, computed in a data type; `None`: no shift."""
        return factor_and_shift(self.kind, self.constant.detach().to(dtype))


Affine = BatchNorm | ChannelConstant


def affine_of(site: CallSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Affine:
    """What a call that folds computes with."""
    if site.op.kind == "batch_norm":
        return BatchNorm.of_call(args, kwargs)
    return ChannelConstant(site.op.kind, constant_of(args, kwargs, site.sources[0].slot))


def folded(layers: Iterable[Affine], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    """The factor and the shift of several layers, one after the other; each 1-d, with one value for each channel or one for all.

    >>> folded([ChannelConstant("mul", torch.tensor([2.0, 3.0])), ChannelConstant("add", torch.tensor(1.0)), ChannelConstant("mul", torch.tensor(-1.0))])
    (tensor([-2., -3.]), tensor([-1.]))
    """
    factor, shift = torch.ones(1, dtype=dtype), None
    for layer in layers:
        own_factor, own_shift = layer.factor_and_shift(dtype)
        factor = factor.to(own_factor.device) * own_factor
        if shift is not None:
            shift = shift * own_factor
        if own_shift is not None:
            shift = own_shift if shift is None else shift + own_shift
    return factor, shift
