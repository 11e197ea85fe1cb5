"""How a tensor's values lie in memory: for kernels, which go through it from one end to the other, whatever the order of the axes."""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the values fill their memory without gaps or overlaps, in whatever order: channels last, or heads swapped with positions."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def around(weight: Tensor, axis: int) -> tuple[int, int, int]:
    """How many values there are, in the order of memory, before an axis of a dense tensor, along it, and after it.

    >>> around(torch.ones(4, 3, 2), 1), around(torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last), 0)
    ((4, 3, 2), (1, 4, 12))
    """
    count, channels = weight.numel(), weight.shape[axis]
    if channels < 2 or not count:  # a stride says nothing then
        return 1, channels, count
    inner = weight.stride(axis)
    return count // (channels * inner), channels, inner
