"""Ranges of all quantizers at once: moving on in training, equal on all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_cco.compat.autograd import foreach_copy
from lightning_cco.compat.modules import buffers_of
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.outliers import new_outliers
from lightning_cco.quantization.qparams import affine_qparams
from lightning_cco.quantization.range_kernel import move_by_kernel
from lightning_cco.quantization.ranges import says_something
from lightning_cco.quantization.tracing import reads_at_once

# How many times as wide as its range a batch's values must be to be no part of what the range follows, unless the next batch's are too.
_OUTLIER = 1000.0
_INF = float("inf")


@torch.no_grad()
def update_ranges(quantizers: Sequence[ActivationQuantizer], outliers_before: Tensor | None = None) -> Tensor | None:
    """Let the ranges follow what has passed in training since they last moved; all of them in a few operations, and one reduction over all ranks.

    Min-max ranges widen to the batch; others move towards it by the averaging constant. Under DDP a batch is that of all ranks: their smallest and
    largest value for min-max, else the mean of their ends. Values that are not finite move nothing, nor do zeros and empty tensors; nor does a single batch
    of values a thousand times as large as the range, an outlier. Where the next batch is like it, the range was wrong: it becomes that of the batch.

    Args:
        quantizers: The same ones in the same order on every rank. Frozen and settled ones stay.
        outliers_before: What the last update returned, for those that are not frozen now.

    Returns:
        Which of the quantizers that are not frozen met values a thousand times as large in the last batch that said something, bool; `None` if all are
        frozen. See `Outliers`.
    """
    moving = [quantizer for quantizer in quantizers if not quantizer.fixed]
    if not moving:
        return None
    outliers = move_by_kernel(moving, _OUTLIER, outliers_before) if world_size() == 1 else None
    if outliers is None:
        outliers = _move(moving, outliers_before)
        forget_batches(moving)
    for quantizer in moving:
        if quantizer.empty:
            quantizer.notice_in_training()
    return outliers


def _move(moving: Sequence[ActivationQuantizer], outliers_before: Tensor | None) -> Tensor:
    """By operations of PyTorch."""
    widens = moving[0].estimator == "min_max"
    low, high, seen = _batch_of_all_ranks(moving, widens)
    buffers = [buffers_of(quantizer) for quantizer in moving]  # read directly: a module's attributes take a microsecond each
    min_val, max_val = torch.stack([held["min_val"] for held in buffers]), torch.stack([held["max_val"] for held in buffers])
    if widens:
        new_min, new_max = torch.minimum(min_val, low), torch.maximum(max_val, high)
        empty = (min_val == 0) & (max_val == 0)
    else:
        ratio, constant = torch.stack([held["clip_ratio"] for held in buffers]), moving[0].averaging_constant
        new_min, new_max = _towards(min_val, low * ratio, constant), _towards(max_val, high * ratio, constant)
        # What was all zeros so far (an adapter that begins at 0) has no range yet to move from.
        empty = (min_val == 0) & (max_val == 0)
        new_min, new_max = torch.where(empty, low * ratio, new_min), torch.where(empty, high * ratio, new_max)
    outliers = seen & ~empty & (_width(low, high) > _OUTLIER * _width(min_val, max_val))
    first = new_outliers(outliers, outliers_before)
    again = outliers & ~first
    if outliers_before is not None:
        outliers = torch.where(seen, outliers, outliers_before)  # where nothing passed, the last batch is still the one before
    if not widens:
        new_min, new_max = torch.where(again, low * ratio, new_min), torch.where(again, high * ratio, new_max)
    seen = again | (seen & ~first.any())  # what an outlier makes of the layers after it says as little
    min_val, max_val = torch.where(seen, new_min, min_val), torch.where(seen, new_max, max_val)
    formats: dict[tuple[int, bool], list[int]] = {}
    for position, quantizer in enumerate(moving):
        formats.setdefault((quantizer.num_bits, quantizer.symmetric), []).append(position)
    for (num_bits, symmetric), positions in formats.items():
        ends = min_val, max_val
        if len(formats) > 1:
            lows, highs = min_val.unbind(), max_val.unbind()  # an index would have to be sent to the device
            ends = torch.stack([lows[position] for position in positions]), torch.stack([highs[position] for position in positions])
        qparams = affine_qparams(*ends, num_bits, symmetric)
        for name, values in zip(("min_val", "max_val", "scale", "zero_point"), (*ends, *qparams), strict=True):
            foreach_copy([buffers[position][name] for position in positions], list(values.unbind()))
        if reads_at_once(min_val.device):
            for position, scale, zero_point in zip(positions, *(values.tolist() for values in qparams), strict=True):
                moving[position].note_numbers(scale, zero_point)
    return outliers


def _towards(start: Tensor, end: Tensor, share: float) -> Tensor:
    """As `torch.lerp`, but of operations that round alike everywhere: that one rounds once where it could round twice on some processors."""
    return start + (end - start) * share if share < 0.5 else end + (end - start) * (share - 1.0)


def _width(low: Tensor, high: Tensor) -> Tensor:
    """From 0 or the smallest value to 0 or the largest."""
    return high.clamp(min=0.0) - low.clamp(max=0.0)


@torch.no_grad()
def forget_batches(quantizers: Sequence[ActivationQuantizer]) -> None:
    """Drop what passed since the ranges last moved."""
    if quantizers:
        extrema = [buffers_of(quantizer)["extrema"] for quantizer in quantizers]
        nothing = torch.full((2,), _INF, dtype=torch.float32, device=extrema[0].device)  # made there: sending it would wait for the device
        nothing[1:].neg_()
        foreach_copy(extrema, [nothing] * len(extrema))


def _batch_of_all_ranks(quantizers: Sequence[ActivationQuantizer], widens: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Lower ends, upper ends, and which of them are known; one of each per quantizer."""
    low, high = torch.stack([buffers_of(quantizer)["extrema"] for quantizer in quantizers]).unbind(1)
    seen = says_something(low, high)
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
def sync_calibration(quantizers: Sequence[ActivationQuantizer]) -> list[Tensor | None] | None:
    """Make ranges equal on all ranks before a calibration is finished. Nothing happens on a single process.

    Min-max and mse ranges take the smallest and the largest of the ranks, others the mean; ranks where nothing was observed have no say. Evidence of NaN
    and infinity is shared too.

    Args:
        quantizers: The same ones in the same order on every rank.

    Returns:
        For quantizers of the ``mse`` estimator the `clip_errors` of all ranks together, `None` for others.
    """
    if not quantizers or world_size() == 1:
        return None
    device = quantizers[0].min_val.device
    known = torch.tensor([float(q.observed > 0) for q in quantizers], dtype=torch.float32, device=device)
    ends = torch.stack([torch.stack([-q.min_val for q in quantizers]), torch.stack([q.max_val for q in quantizers])])
    most = torch.cat([torch.where(known > 0, ends, -_INF), torch.stack([torch.stack([q.non_finite for q in quantizers]).float(), known])])
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    sums = torch.cat([torch.where(known > 0, ends, 0.0), known.unsqueeze(0)])
    dist.all_reduce(sums)
    widens = torch.tensor([q.estimator in ("min_max", "mse") for q in quantizers], device=device)
    ends = torch.where(widens, most[:2], sums[:2] / sums[2].clamp(min=1.0))
    found = most[3].tolist()
    for number, quantizer in enumerate(quantizers):
        quantizer.non_finite.copy_(most[2, number] > 0)
        if found[number]:
            quantizer.min_val.copy_(-ends[0, number])
            quantizer.max_val.copy_(ends[1, number])
            quantizer.observed = max(1, quantizer.observed)
    sampled = [quantizer for quantizer in quantizers if quantizer.estimator == "mse"]
    if not sampled:
        return None
    errors = torch.stack([quantizer.clip_errors() for quantizer in sampled])
    dist.all_reduce(errors)
    of_all = iter(errors.unbind())
    return [next(of_all) if quantizer.estimator == "mse" else None for quantizer in quantizers]
