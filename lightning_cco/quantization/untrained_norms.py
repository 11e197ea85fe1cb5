"""Norms that have seen no batch yet, or few: their running statistics are 0 and 1, or half of them are, and a training normalizes by those of the batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cco.compat.modules import BatchNormBase
from lightning_cco.errors import CCOWarning
from lightning_cco.names import list_names
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.tensor_key import TensorKey

_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_MOST_OF_THE_BEGINNING = 0.05
"""Part of the statistics that a norm begins with, 0 and 1, up to which those that it has are its own: reached after 29 batches at the usual momentum."""


def untrained_norms(model: nn.Module) -> dict[str, Any]:
    """The batch and instance norms that are in training mode, and whose running statistics are still, or in part, those that they begin with, by path.

    Ranges that are calibrated with such statistics are not those of the training: it would clip nearly everything, and its gradients would explode where a
    norm divides by what little varies of that.

    >>> list(untrained_norms(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval(), nn.BatchNorm1d(2, track_running_stats=False))))
    ['0']
    """
    return {path: module for path, module in model.named_modules() if module.training and _is_untrained(module)}


def _is_untrained(module: Any) -> bool:
    if not isinstance(module, (BatchNormBase, *_INSTANCE_NORMS)):
        return False
    mean, variance, count = module.running_mean, module.running_var, module.num_batches_tracked
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor) or count is None:
        return False
    untouched = not bool(mean.any()) and torch.equal(variance, torch.ones_like(variance))
    return untouched if not int(count) else left_of_the_beginning(module.momentum, int(count)) > _MOST_OF_THE_BEGINNING


def left_of_the_beginning(momentum: float | None, batches: int) -> float:
    """The part that the values which a running average began with have in it after so many batches.

    >>> left_of_the_beginning(0.1, 6), left_of_the_beginning(None, 1)  # None: the average of all batches
    (0.531441, 0.0)
    """
    return 0.0 if momentum is None else (1 - momentum) ** batches


@contextmanager
def by_batch_statistics(norms: Iterable[Any]) -> Iterator[None]:
    """Inside the block these norms normalize by the statistics of each batch, also in evaluation mode, and keep none of them.

    Under DDP each rank takes those of its own batch: ranks may see different numbers of batches.
    """
    held = [(norm, norm.running_mean, norm.running_var, norm.track_running_stats) for norm in norms]
    try:
        for norm, *_ in held:
            norm.running_mean = norm.running_var = None  # which is how PyTorch's norms tell that there are none
            norm.track_running_stats = False
        yield
    finally:
        for norm, mean, variance, tracks in held:
            norm.running_mean, norm.running_var, norm.track_running_stats = mean, variance, tracks


def warn_of_frozen_ranges(norms: Mapping[str, Any], observed: Mapping[TensorKey, ActivationQuantizer]) -> None:
    """Say which ranges of an untrained network will not follow its training."""
    fixed = list(dict.fromkeys(key.layer for key, quantizer in observed.items() if quantizer.frozen or quantizer.settled))
    if norms and fixed:
        warnings.warn(
            f"calibrate: the network is not trained yet (its norms have seen no batch, or few: {list_names(list(norms))}), and at few bits the ranges of "
            f"{list_names(fixed)} stay as the calibration finds them. Train in float first (training_settings: {{start_at_step: 1000}}, or a checkpoint), or "
            "let the ranges follow (range_estimator: moving_average).",
            CCOWarning,
            stacklevel=3,
        )


def warn_of_evaluation_mode(model: nn.Module) -> None:
    """Say of an untrained network that is calibrated in evaluation mode that the ranges are not those of a training.

    What is in evaluation mode may be meant to stay there, so it is calibrated as it evaluates.
    """
    norms = [] if model.training else [path for path, module in model.named_modules() if _is_untrained(module)]
    if norms:
        warnings.warn(
            f"calibrate: the network is not trained yet (its norms have seen no batch, or few: {list_names(norms)}), and it is in evaluation mode, so "
            "the ranges are those of running statistics that its training does not normalize by: it would clip most values. If it is to be trained, "
            "call model.train() before calibrate().",
            CCOWarning,
            stacklevel=3,
        )
