"""Looking at the batches that are trained on next without taking them from the training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_cco.compat.lightning_loaders import (
    Stateful,
    loader_of,
    reload_if_due,
    set_sampler_epoch,
    training_fetcher,
    training_loader,
)
from lightning_cco.compat.lightning_trainer import validation_loader
from lightning_cco.errors import CCOWarning
from lightning_cco.graph.snapshot import Snapshot
from lightning_cco.loader_copy import copied_loader, draws_by_a_known_order, read_from_copy, skip_batches
from lightning_cco.prefetch_iterator import Begun, PrefetchIterator

_KEPT_BYTES = 1 << 30
"""How much memory the batches that were drawn early may take until they are trained on."""


def prefetch(trainer: pl.Trainer, begun: int | None = None) -> tuple[PrefetchIterator | None, float, CombinedLoader | None]:
    """The prefetching iterator of the training loop, made at the first call; how many batches the epoch that begins, or runs, still has; a copy of the loaders.

    No iterator where it matters when a batch is drawn; no copy where there can't be one.

    Args:
        trainer: The Trainer.
        begun: How many batches of the running epoch the loop has begun with; `None` between ``on_train_start`` and the first batch of an epoch.
    """
    loop = trainer.fit_loop
    if begun is None:
        reload_if_due(trainer)
    fetcher, combined = training_fetcher(trainer), training_loader(trainer)
    assert fetcher is not None
    assert combined is not None
    epoch_loop, epoch = loop.epoch_loop, trainer.current_epoch
    batches: Any = epoch_loop.batch_progress.current
    trained = batches.processed if epoch_loop.restarting else 0
    if getattr(epoch_loop, "restarted_on_train_batch_end", False) and trained >= trainer.num_training_batches:
        trained = 0  # the loop counts that epoch as done and goes on in the next one, with the iteration that is begun
    left = trainer.num_training_batches - trained
    again = trainer.current_epoch > 0 and not getattr(loop, "is_resuming", False) and not epoch_loop.restarting
    ended = getattr(epoch_loop, "restarted_on_last", False) and epoch_loop.batch_progress.is_last_batch
    if begun is not None:
        again, left = False, trainer.num_training_batches - begun
    elif left <= 0 or ended:  # the checkpoint is from the end of an epoch: the loop goes on with the next one
        again, left, epoch = True, trainer.num_training_batches, epoch + 1
    spare = copied_loader(trainer, combined)
    in_process = not all(getattr(loader, "num_workers", 0) for loader in combined.flattened)
    if spare is not None and (again or in_process or not draws_by_a_known_order(combined)):
        for loader in spare.flattened:
            set_sampler_epoch(loader, epoch)
            skip_batches(loader, begun or 0)
        return None, left, spare
    waiting = loader_of(fetcher)
    current = (
        fetcher.iterator if isinstance(fetcher.iterator, PrefetchIterator) else waiting.prefetched if isinstance(waiting, Begun) else None
    )
    if current is not None and current.in_front:
        return current.following or current, left, spare
    for loader in combined.flattened if begun is None else ():
        set_sampler_epoch(loader, epoch)
    prefetched = PrefetchIterator(fetcher, again)
    if epoch_loop.restarting and any(isinstance(loader, Stateful) for loader in combined.flattened) and not prefetched.draw():
        # The place in a checkpoint was after the last batch: an epoch without batches comes, then another iteration.
        prefetched, left = PrefetchIterator(fetcher, again=True, before=prefetched), trainer.num_training_batches
    return prefetched, left, spare


def left_over(trainer: pl.Trainer) -> int:
    """How many batches of a stream have been drawn and not been trained on."""
    fetcher = training_fetcher(trainer)
    prefetched = fetcher.iterator if fetcher is not None else None
    if isinstance(prefetched, PrefetchIterator) and prefetched.kept and copied_loader(trainer, prefetched.combined) is None:
        return len(prefetched.kept)
    return 0


def warn_of_left_over(trainer: pl.Trainer) -> None:
    """Say at the end of an epoch, if it ended early, what was drawn from a stream and not trained on."""
    if count := left_over(trainer):
        warnings.warn(
            f"The epoch ended before {count} batches of the training loader that the calibration had drawn were trained on. A stream that "
            "gives each sample once has lost them. Set training_settings.stats_steps to at most the number of batches in an epoch.",
            CCOWarning,
            stacklevel=2,
        )


def why_empty(trainer: pl.Trainer) -> str:
    """What may have emptied the training's loaders: a validation of the same stream."""
    training, validation = training_loader(trainer), validation_loader(trainer)
    streams = [
        stream
        for combined in (training, validation)
        if combined is not None
        for loader in combined.flattened
        for stream in _streams(loader)
    ]
    shared = next((stream for number, stream in enumerate(streams) if any(stream is one for one in streams[:number])), None)
    if shared is None:
        return ""
    return (
        f" The validation reads from the same object, a {type(shared).__name__}, which gives each sample once, and has taken all of it before the training "
        "began. Give training and validation streams of their own, or set Trainer(num_sanity_val_steps=...) and limit_val_batches to less than it has."
    )


def why_no_batch(trainer: pl.Trainer) -> str:
    """Why a fit has ended without a batch, as far as the Trainer tells."""
    timer = next((callback for callback in trainer.callbacks if isinstance(callback, Timer)), None)  # type: ignore[attr-defined]
    remaining = None if timer is None else timer.time_remaining()
    if trainer.limit_train_batches == 0:
        return "limit_train_batches is 0"
    if trainer.max_epochs not in (None, -1) and trainer.current_epoch >= trainer.max_epochs:
        begun = f", and the training is at epoch {trainer.current_epoch} by its checkpoint" if trainer.current_epoch else ""
        return f"max_epochs is {trainer.max_epochs}{begun}"
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        begun = f", and the training is at step {trainer.global_step} by its checkpoint" if trainer.global_step else ""
        return f"max_steps is {trainer.max_steps}{begun}"
    if remaining is not None and remaining <= 0:
        return "the time of the Timer (max_time) was over"
    if trainer.should_stop:
        return "trainer.should_stop was set before"
    return "the training loader gave none" if trainer.num_training_batches == 0 else "the Trainer does not tell why"


def _streams(loader: Any) -> list[Any]:
    """A loader and its data."""
    return [loader, loader.dataset] if hasattr(loader, "dataset") else [loader]


def upcoming_batches(trainer: pl.Trainer, count: int, begun: int | None = None) -> Iterator[Any]:
    """The batches that the training loop gets next, at most ``count``; copies, so that whatever is done to them, the training sees none of it.

    In the midst of an epoch ``begun`` says how many of its batches the loop has begun with.

    Where worker processes load in an order that is fixed when the iteration begins, they are drawn from the training's own iterator and given back to it.
    Else the order, or the samples, may follow from what this process's random numbers are, or what was trained, when a batch is due: then other batches come,
    from a copy of the loaders. So do those that would take too much memory. Streams are not copied, since what they read
    may be gone then (a queue, a place kept in a file): theirs are always drawn early, fewer of them if they are large; where that changes random numbers, or
    comes before what a hook changes in the data, a warning says so.
    """
    prefetched, left, spare = prefetch(trainer, begun)
    if prefetched is None:
        return islice(read_from_copy(spare), int(min(count, left))) if spare is not None else iter(())
    if spare is None and trainer.max_steps >= 0:  # what a stream gives and nobody trains on is lost
        left = min(left, max(1, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches))
    count = int(min(count, left))
    while len(prefetched.upcoming) < count and prefetched.kept_bytes < _KEPT_BYTES and prefetched.draw():
        pass
    early = [item[0] for item in prefetched.upcoming[:count]]
    more = spare is not None and not prefetched.exhausted and len(early) < count
    rest = islice(read_from_copy(spare), len(early), count) if spare is not None and more else iter(())
    return (copied(batch) for batch in chain(early, rest))


def copied(batch: Any) -> Any:
    """A batch that may be written to."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # tensors with a history, open files
        return apply_to_collection(batch, Tensor, lambda tensor: tensor.detach().clone())


def hooks_undone(trainer: pl.Trainer) -> AbstractContextManager[Any]:
    """Put back at the end of the block what the user's hooks on a batch's way to the device change in the module and in the data module."""
    owners = [owner for owner in (trainer.lightning_module, getattr(trainer, "datamodule", None)) if owner is not None]
    if any(is_overridden(hook, owner) for hook in _TRANSFERS for owner in owners):
        return Snapshot(trainer.lightning_module, others=owners[1:])
    return nullcontext()


_TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
