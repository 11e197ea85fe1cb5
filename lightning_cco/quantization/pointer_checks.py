"""What kernels are given, checked before: no pointer reaches them that they would read or write past its end."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cco.errors import CCOError

MOST_SIGNED, MOST_UNSIGNED = 127, 255
"""Largest levels that the tables of kernels hold: of levels on both sides of 0, and of those that begin with it."""


def last_level(level: int, most: int) -> int:
    """A largest level, for kernels, whose tables hold those of 8 bits.

    Raises:
        CCOError: It is beyond them; nothing was read or written.
    """
    if 1 <= level <= most:
        return level
    raise CCOError(f"kernels: expected a largest level of 1 to {most}, got {level}. Nothing was read or written; write 2 to 8 bits.")


def address_of(tensor: Tensor, dtype: torch.dtype, count: int) -> int:
    """Address of a tensor's values, for C.

    Args:
        tensor: On the CPU.
        dtype: What C takes its values for.
        count: How many values C reads or writes from the address on.

    Raises:
        CCOError: It is of another type, size or device, or its memory ends earlier.
    """
    if tensor.dtype is dtype and tensor.numel() == count and tensor.is_cpu:
        start, storage = tensor.data_ptr(), tensor.untyped_storage()
        if not count or (start and start + count * dtype.itemsize <= storage.data_ptr() + storage.nbytes()):
            return start
    raise CCOError(
        f"kernels: expected {count} values of {dtype} in memory of the CPU, got {tensor.numel()} of {tensor.dtype}, shape {tuple(tensor.shape)}, on "
        f"{tensor.device}, in {tensor.untyped_storage().nbytes()} bytes. Nothing was read or written; LIGHTNING_CCO_NATIVE=0 runs without kernels."
    )


def address_like(tensor: Tensor, other: Tensor) -> int:
    """Address of a tensor whose values lie in memory like those of another one, whose own address is checked as well."""
    if tensor.stride() != other.stride() and not (tensor.is_contiguous() and other.is_contiguous()):
        raise CCOError(
            f"kernels: expected two tensors of the same strides, got {tensor.stride()} and {other.stride()} for shape {tuple(other.shape)}. "
            "Nothing was read or written; LIGHTNING_CCO_NATIVE=0 runs without kernels."
        )
    return address_of(tensor, other.dtype, other.numel())
