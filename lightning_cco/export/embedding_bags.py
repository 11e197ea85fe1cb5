"""An embedding bag as a lookup and a reduction: PyTorch's exporter writes a loop over the bags, whose types OpenVINO 2026.4 can't read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_NAMES = (
    "input",
    "weight",
    "offsets",
    "max_norm",
    "norm_type",
    "scale_grad_by_freq",
    "mode",
    "sparse",
    "per_sample_weights",
    "include_last_offset",
    "padding_idx",
)


def bag_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `torch.nn.functional.embedding_bag` by name."""
    return {**dict(zip(_NAMES, args, strict=False)), **kwargs}


def is_bag(call: dict[str, Any]) -> bool:
    """Whether the arguments are those of the function, and not of `torch.embedding_bag`, which reads its weight first."""
    indices = call.get("input")
    return isinstance(indices, Tensor) and not indices.is_floating_point() and indices.dim() in (1, 2)


def reduced(rows: Tensor, call: dict[str, Any], amax: Callable[..., Tensor] = torch.amax) -> Tensor:
    """The sum, mean or largest of the rows of each bag.

    Args:
        rows: What was looked up, (bags, entries, columns) or (entries, columns).
        call: From `bag_arguments`.
        amax: How the largest values along an axis are written.

    Returns:
        (bags, columns); an empty bag gives zeros.
    """
    indices, mode, padding = call["input"], call.get("mode", "mean"), call.get("padding_idx")
    factors = call.get("per_sample_weights")
    if factors is not None:
        rows = rows * factors.unsqueeze(-1)
    if padding is not None and padding < 0:
        padding = padding + call["weight"].shape[0]
    kept = None if padding is None else indices != padding
    if indices.dim() == 2:
        return _of_rows(rows, mode, kept, amax)
    return _of_offsets(rows, mode, kept, call["offsets"], bool(call.get("include_last_offset", False)))


def _of_rows(rows: Tensor, mode: str, kept: Tensor | None, amax: Callable[..., Tensor]) -> Tensor:
    """Bags of one length."""
    if kept is None:
        return rows.sum(1) if mode == "sum" else rows.mean(1) if mode == "mean" else amax(rows, 1)
    if mode == "max":
        largest = amax(rows.masked_fill(~kept.unsqueeze(-1), float("-inf")), 1)
        return torch.where(kept.any(1, keepdim=True), largest, torch.zeros_like(largest))
    total = (rows * kept.unsqueeze(-1).to(rows.dtype)).sum(1)
    return total if mode == "sum" else total / kept.sum(1, keepdim=True).clamp(min=1).to(rows.dtype)


def _of_offsets(rows: Tensor, mode: str, kept: Tensor | None, offsets: Tensor, with_end: bool) -> Tensor:
    """Bags that begin at offsets: sums are a product with ones and zeros, (bags, entries)."""
    starts = offsets[:-1] if with_end else offsets
    positions = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
    after = positions >= starts.unsqueeze(1)
    if with_end:
        inside = after & (positions < offsets[1:].unsqueeze(1))
    else:
        # The bag of an entry is the last one that begins at or before it.
        inside = after & ((after.to(rows.dtype).sum(0) - 1) == torch.arange(starts.shape[0], device=rows.device).unsqueeze(1))
    if kept is not None:
        inside = inside & kept
    member = inside.to(rows.dtype)
    if mode == "max":
        return _largest(rows, member)
    total = torch.matmul(member, rows)
    return total if mode == "sum" else total / member.sum(1, keepdim=True).clamp(min=1)


def _largest(rows: Tensor, member: Tensor) -> Tensor:
    """The largest of each column in each bag; what is in no bag is scattered below all, to a bag that is cut off."""
    bags = member.shape[0]
    number = torch.arange(1, bags + 1, device=rows.device, dtype=rows.dtype)
    bag = torch.matmul(number, member).to(torch.int64)  # 0: in no bag
    start = torch.full((1, rows.shape[1]), torch.finfo(rows.dtype).min, dtype=rows.dtype, device=rows.device).expand(bags + 1, -1)
    largest = start.scatter_reduce(0, bag.unsqueeze(1).expand(-1, rows.shape[1]), rows, "amax")[1:]
    return torch.where(member.sum(1, keepdim=True) > 0, largest, torch.zeros_like(largest))
