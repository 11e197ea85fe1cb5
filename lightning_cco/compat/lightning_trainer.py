"""What Lightning's Trainer does for a step and has no public name for: batch hooks, optimizers, logged results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

from lightning_cco.compat.resolve import needed, or_else

_call_strategy_hook: Any = or_else(
    "lightning.pytorch.trainer.call._call_strategy_hook",
    lambda trainer, name, *args, **kwargs: getattr(trainer.strategy, name)(*args, **kwargs),
)
_init_optimizers: Any = needed("lightning.pytorch.core.optimizer._init_optimizers_and_lr_schedulers")


def batch_to_device(trainer: pl.Trainer, batch: Any) -> Any:
    """Move a batch to the Trainer's device, through the hooks of the module and the datamodule.

    Private API: ``LightningModule._on_before_batch_transfer`` and ``trainer.call._call_strategy_hook``. Without the first: `AttributeError` before the training
    begins. Without the second: the strategy is asked directly, and the profiler sees none of it.
    """
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return _call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)


def configured_optimizers(module: pl.LightningModule) -> list[Any]:
    """The optimizers that ``configure_optimizers`` makes, checked and wrapped as for a fit.

    Private API: ``lightning.pytorch.core.optimizer._init_optimizers_and_lr_schedulers``. Without it: `CCOError`; a rehearsed step then sees one optimizer.
    """
    return list(_init_optimizers(module)[0])


def logged_step(trainer: pl.Trainer) -> int:
    """The step at which Lightning gives the metrics of an epoch to loggers: the number of its last batch, counted from 0 over all epochs.

    Private API: ``_TrainingEpochLoop._batches_that_stepped``. Without it: ``Trainer.global_step``, which counts the steps of each optimizer, so with several
    of them pictures and metrics are logged at different steps.
    """
    stepped = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
    return max(0, int(stepped) - 1)


def running_results(trainer: pl.Trainer) -> Any:
    """What is logged by the loop that runs now; has ``metrics(on_step)`` and ``dataloader_idx``. `None` outside of a loop.

    Private API: ``Trainer._results``. Without it: `None`; with several loaders the sanity check's metrics are not shown.
    """
    return getattr(trainer, "_results", None)


def logged_results(trainer: pl.Trainer) -> Iterator[Any]:
    """Each value that training and validation have logged, with ``meta.name`` and ``value``.

    Private API: ``_results`` of the fit and the validation loop. Without it: nothing; which end of a metric is better then follows from callbacks and names.
    """
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop):
        yield from (getattr(loop, "_results", None) or {}).values()


def validation_loader(trainer: pl.Trainer) -> Any:
    """The loaders of a fit's validation as one; `None` where there is none.

    Private API: ``_EvaluationLoop._combined_loader``. Without it: `None`.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    if getattr(loop, "_combined_loader", None) is None and hasattr(loop, "_combined_loader") and trainer.enable_validation:
        loop.setup_data()
    return getattr(loop, "_combined_loader", None)


@contextmanager
def validation_loader_replaced(trainer: pl.Trainer, replace: Callable[[Any], Any]) -> Iterator[bool]:
    """Let the validation of a fit read from another loader inside the block; says whether it does: not where there is none, or ``replace`` gives `None`.

    Private API: ``_EvaluationLoop._combined_loader`` and ``_data_fetcher``. Without the first: nothing is replaced.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    before = validation_loader(trainer)
    other = None if before is None else replace(before)
    if other is None:
        yield False
        return
    fetcher = getattr(loop, "_data_fetcher", None)
    loop._combined_loader = other
    try:
        yield True
    finally:
        other.reset()
        loop._combined_loader, loop._data_fetcher = before, fetcher


def sanity_check(trainer: pl.Trainer, progress_has_begun: bool) -> None:
    """Validate as Lightning does before a training: nothing is logged, and callbacks know that it does not count.

    Args:
        trainer: The Trainer.
        progress_has_begun: Whether the progress bar is that of the training already: then it begins anew, since the end of a sanity check ends it.

    Private API: ``Trainer._run_sanity_check``. Without it: no validation.
    """
    run = getattr(trainer, "_run_sanity_check", None)
    if run is None:
        return
    run()
    progress = trainer.progress_bar_callback
    if progress_has_begun and progress is not None and getattr(progress, "is_enabled", True):
        progress.on_train_start(trainer, trainer.lightning_module)
