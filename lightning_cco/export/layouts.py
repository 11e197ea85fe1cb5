"""A model in PyTorch's usual layout for as long as it is exported: some engines take the layout of a tensor in memory for a part of its type.

ExecuTorch fixes the order of a file's input axes by the strides of the example. It converts no constants whose axes are in another order
(``channels_last``), and none with a stride of 0 (``array[:, None]`` of NumPy, ``expand``), also where that axis has one entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def usual(tensor: Tensor) -> Tensor:
    """The same values, the last axis next to each other; the tensor itself where it is so.

    `Tensor.contiguous` keeps whatever stride an axis of one entry has.

    Example:
        >>> given = torch.ones(2, 8).as_strided((2, 1, 8), (8, 0, 1))
        >>> given.contiguous().stride(), usual(given).stride()
        ((8, 0, 1), (8, 8, 1))
    """
    return tensor if _is_usual(tensor) else tensor.clone(memory_format=torch.contiguous_format)


@contextmanager
def in_usual_layout(model: nn.Module) -> Iterator[None]:
    """Inside the block all parameters and buffers are in the usual layout; after it they are where they were."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values()
    before = [(tensor, tensor.data) for tensor in tensors if not _is_usual(tensor)]
    try:
        for tensor, data in before:
            tensor.data = usual(data)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def _is_usual(tensor: Tensor) -> bool:
    return tensor.layout is not torch.strided or tensor.stride() == torch.empty(tensor.shape, device="meta").stride()
