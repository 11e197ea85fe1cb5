"""What Lightning's Trainer does for a step and has no public name for: batch hooks, optimizers, logged results."""

from __future__ import annotations

from collections.abc import Iterator
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
