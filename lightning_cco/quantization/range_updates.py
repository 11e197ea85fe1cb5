"""Ranges of all quantizers at once: moving on in training, equal on all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_cco.quantization.fake_quantize import affine_qparams
from lightning_cco.quantization.quantizer import ActivationQuantizer

_INF = float("inf")


@torch.no_grad()
def update_ranges(quantizers: Sequence[ActivationQuantizer]) -> None:
    """Let the ranges follow what has passed in training since they last moved; all of them in a few operations, and one reduction over all ranks.

    Min-max ranges widen to the batch; others move towards it by the averaging constant. Under DDP a batch is that of all ranks: their smallest and
    largest value for min-max, else the mean of their ends. Values that are not finite move nothing.

    Args:
        quantizers: The same ones in the same order on every rank. Frozen ones stay.
    """
    moving = [quantizer for quantizer in quantizers if not quantizer.frozen]
    if not moving:
        return
    widens = moving[0].estimator == "min_max"
    low, high, seen = _batch_of_all_ranks(moving, widens)
    min_val, max_val = torch.stack([q.min_val for q in moving]), torch.stack([q.max_val for q in moving])
    if widens:
        new_min, new_max = torch.minimum(min_val, low), torch.maximum(max_val, high)
    else:
        ratio, constant = torch.stack([q.clip_ratio for q in moving]), moving[0].averaging_constant
        new_min, new_max = torch.lerp(min_val, low * ratio, constant), torch.lerp(max_val, high * ratio, constant)
        # What was all zeros so far (an adapter that begins at 0) has no range yet to move from.
        empty = (min_val == 0) & (max_val == 0)
        new_min, new_max = torch.where(empty, low * ratio, new_min), torch.where(empty, high * ratio, new_max)
    min_val, max_val = torch.where(seen, new_min, min_val), torch.where(seen, new_max, max_val)
    formats: dict[tuple[int, bool], list[int]] = {}
    for position, quantizer in enumerate(moving):
        formats.setdefault((quantizer.num_bits, quantizer.symmetric), []).append(position)
    for (num_bits, symmetric), positions in formats.items():
        chosen = [moving[position] for position in positions]
        index = torch.tensor(positions, dtype=torch.int64, device=min_val.device)
        ends = min_val[index], max_val[index]
        qparams = affine_qparams(*ends, num_bits, symmetric)
        for name, values in zip(("min_val", "max_val", "scale", "zero_point"), (*ends, *qparams), strict=True):
            torch._foreach_copy_([getattr(quantizer, name) for quantizer in chosen], list(values.unbind()))
        if min_val.device.type == "cpu":
            for quantizer, scale, zero_point in zip(chosen, *(values.tolist() for values in qparams), strict=True):
                quantizer._numbers = (quantizer.scale._version, quantizer.zero_point._version), (scale, zero_point)
    nothing = torch.tensor([_INF, -_INF], dtype=torch.float32, device=min_val.device)
    torch._foreach_copy_([quantizer.extrema for quantizer in moving], [nothing] * len(moving))


def _batch_of_all_ranks(quantizers: Sequence[ActivationQuantizer], widens: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Lower ends, upper ends, and which of them are known; one of each per quantizer."""
    low, high = torch.stack([q.extrema for q in quantizers]).unbind(1)
    seen = torch.isfinite(low) & torch.isfinite(high)
    if world_size() == 1:
        return low, high, seen
    if widens:
        bounds = torch.stack([torch.where(seen, -low, -_INF), torch.where(seen, high, -_INF)])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        return -bounds[0], bounds[1], torch.isfinite(bounds).all(dim=0)
    sums = torch.stack([torch.where(seen, low, 0.0), torch.where(seen, high, 0.0), seen.float()])
    dist.all_reduce(sums)
    count = sums[2].clamp(min=1.0)
    return sums[0] / count, sums[1] / count, sums[2] > 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def sync_calibration(quantizers: Sequence[ActivationQuantizer]) -> None:
    """Make ranges equal on all ranks before a calibration is finished: one reduction for all of them. Nothing happens on a single process.

    Min-max and mse ranges take the smallest and the largest of the ranks, others the mean. Evidence of NaN and infinity is shared too.

    Args:
        quantizers: The same ones in the same order on every rank.
    """
    if not quantizers or world_size() == 1:
        return
    bounds = torch.stack([*(-q.min_val for q in quantizers), *(q.max_val for q in quantizers)])
    if quantizers[0].estimator in ("min_max", "mse"):
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    else:
        dist.all_reduce(bounds)
        bounds /= dist.get_world_size()
    flags = torch.stack([q.non_finite for q in quantizers]).float()
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    for number, quantizer in enumerate(quantizers):
        quantizer.min_val.copy_(-bounds[number])
        quantizer.max_val.copy_(bounds[len(quantizers) + number])
        quantizer.non_finite.copy_(flags[number] > 0)
