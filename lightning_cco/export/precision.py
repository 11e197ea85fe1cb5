"""A model in float32 for as long as it is exported: no INT8 kernel of an engine takes or gives bfloat16, half or double."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def in_float32(model: nn.Module) -> Iterator[list[str]]:
    """Inside the block all floating-point parameters and buffers are float32; after it they are what they were, to the last bit.

    Yields:
        The types, other than float32, that there were.
    """
    before = [(tensor, tensor.data, tensor.grad) for tensor in _tensors(model) if tensor.dtype is not torch.float32]
    try:
        for tensor, data, _ in before:
            tensor.grad = None  # a gradient is of its parameter's type
            tensor.data = data.float()
        yield sorted({str(data.dtype).removeprefix("torch.") for _, data, _ in before})
    finally:
        for tensor, data, grad in before:
            tensor.data = data
            tensor.grad = grad


def float_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and floating-point buffers in float32, each tensor once."""
    return sum(4 * tensor.numel() for tensor in _tensors(model))


def _tensors(model: nn.Module) -> list[Tensor]:
    """Each once: tied parameters are one."""
    return list({id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()}.values())
