"""Average pooling of windows as a convolution of each channel with equal weights, for engines whose own pooling rounds on the scale of what it reads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_cco.export.fold_batch_norm import IntegerWeight
from lightning_cco.graph.layer import Layer

_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


def window_of(layer: Layer) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Height and width of the windows of an average pooling of images, and its strides; `None`: it has one window for all, or is none."""
    before, after = layer.input_shapes[0], layer.output_shapes[0]
    if len(before) != 4 or len(after) != 4:
        return None
    if layer.kind == "avg_pool":
        kernel = _pair(layer.attributes["kernel_size"])
        return kernel, _pair(layer.attributes.get("stride") or kernel)
    if layer.kind == "adaptive_avg_pool" and tuple(after[2:]) != (1, 1):
        kernel = before[2] // after[2], before[3] // after[3]
        return kernel, kernel
    return None


def window_weight(layer: Layer) -> IntegerWeight | None:
    """The weights of such a convolution, (channels, 1, height, width), of 127 each."""
    found = window_of(layer)
    if found is None:
        return None
    (height, width), _ = found
    channels = layer.input_shapes[0][1]
    integers = torch.full((channels, 1, height, width), 127, dtype=torch.int8)
    return IntegerWeight(integers, torch.full((channels,), 1 / (127 * height * width)), 0, None)


def averaged(x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """The averages of whole windows, with the weights of `window_weight`."""
    found = window_of(layer)
    assert found is not None
    return F.conv2d(x, weight, None, found[1], groups=x.shape[1])


def averaged_in_float(*args: Any, **kwargs: Any) -> Tensor:
    """`torch.nn.functional.avg_pool2d` of any arguments: sums of windows by a convolution, divided by how many values each counts.

    >>> x = torch.arange(50.0).reshape(1, 2, 5, 5)
    >>> call = {"padding": 1, "ceil_mode": True, "count_include_pad": False}
    >>> torch.allclose(averaged_in_float(x, 3, 2, **call), F.avg_pool2d(x, 3, 2, **call))
    True
    """
    call = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    x = call.pop("input")
    if x.dim() != 4:
        return F.avg_pool2d(x, **call)
    kernel, padding = _pair(call["kernel_size"]), _pair(call.get("padding", 0))
    stride, divisor = _pair(call.get("stride") or kernel), call.get("divisor_override")
    whole, counted = bool(call.get("ceil_mode")), bool(call.get("count_include_pad", True))
    sizes = zip(x.shape[2:], kernel, stride, padding, strict=True)
    axes = [_axis(int(size), length, step, border, whole, counted) for size, length, step, border in sizes]
    (above, below, rows), (left, right, columns) = ((padding[axis], after, counts) for axis, (after, counts) in enumerate(axes))
    shares = torch.tensor([[1 / (divisor or row * column) for column in columns] for row in rows])
    weight = torch.ones(x.shape[1], 1, *kernel)
    return F.conv2d(F.pad(x, (left, right, above, below)), weight, None, stride, groups=x.shape[1]) * shares


def _axis(size: int, kernel: int, stride: int, padding: int, whole: bool, counted: bool) -> tuple[int, list[int]]:
    """How many zeros an axis needs after it, and how many values each window counts along it.

    Args:
        size: Values along it.
        kernel: Those of a window.
        stride: From one window to the next.
        padding: Zeros before it, and after it.
        whole: Whether a window that does not fit in is there as well, if it begins within.
        counted: Whether zeros of the padding count.
    """
    room = size + 2 * padding - kernel
    number = (room + (stride - 1 if whole else 0)) // stride + 1
    number -= (number - 1) * stride >= size + padding  # it would begin after everything
    starts = [index * stride - padding for index in range(number)]
    first, last = (-padding, size + padding) if counted else (0, size)
    counts = [min(start + kernel, last) - max(start, first) for start in starts]
    return starts[-1] + kernel - size, counts


def _pair(value: Any) -> tuple[int, int]:
    first, *rest = value if isinstance(value, (tuple, list)) else (value,)
    return int(first), int(rest[0] if rest else first)
