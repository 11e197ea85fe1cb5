"""Whether a metric is better low or high: what the run itself says of it, else what its name does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl

from lightning_cco.compat.lightning_trainer import logged_results

_LOW = {"loss", "err", "error", "perplexity", "ppl", "mse", "mae", "rmse", "wer", "cer", "nll"}
_HIGH = {
    "acc",
    "accuracy",
    "top1",
    "top5",
    "f1",
    "auc",
    "auroc",
    "precision",
    "recall",
    "iou",
    "miou",
    "dice",
    "map",
    "bleu",
    "psnr",
    "ssim",
}


def metric_directions(trainer: pl.Trainer, names: Iterable[str]) -> dict[str, str]:
    """``min`` or ``max`` for each metric of which it is known.

    By falling weight: the mode of callbacks and schedulers that monitor it (`ModelCheckpoint`, `EarlyStopping`, `ReduceLROnPlateau`);
    ``higher_is_better`` of a torchmetrics metric that was logged as such; the words of its name (``val_loss``, ``val/top1``).

    Args:
        trainer: The Trainer at the end of an epoch.
        names: Names of the metrics.
    """
    known = {**_logged_metrics(trainer), **_monitored(trainer)}
    found = {}
    for name in names:
        direction = known.get(name) or by_name(name)
        if direction is not None:
            found[name] = direction
    return found


def by_name(name: str) -> str | None:
    """What a metric's name says.

    >>> by_name("val/loss_cls"), by_name("val_acc"), by_name("lr"), by_name("accuracy_loss")
    ('min', 'max', None, None)
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    low, high = bool(words & _LOW), bool(words & _HIGH)
    return None if low == high else "min" if low else "max"


def _monitored(trainer: pl.Trainer) -> dict[str, str]:
    found: dict[str, str] = {}
    schedulers = [(config.monitor, config.scheduler) for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    watchers = [(getattr(callback, "monitor", None), callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    for name, watcher in [*schedulers, *watchers]:
        mode = getattr(watcher, "mode", None)
        if isinstance(name, str) and mode in ("min", "max"):
            found[name] = mode
    return found


def _logged_metrics(trainer: pl.Trainer) -> dict[str, str]:
    found = {}
    for result in logged_results(trainer):
        better = getattr(getattr(result, "value", None), "higher_is_better", None)
        if better is not None:
            found[result.meta.name] = "max" if better else "min"
    return found


def best_of(extremes: Mapping[str, Any], direction: str | None) -> tuple[float, int] | None:
    """Best value so far and its epoch; `None` where it isn't known which way is better.

    Args:
        extremes: ``lowest``, ``lowest_epoch``, ``highest``, ``highest_epoch``.
        direction: ``min``, ``max`` or `None`.
    """
    if direction is None:
        return None
    end = "lowest" if direction == "min" else "highest"
    return extremes[end], int(extremes[f"{end}_epoch"])
