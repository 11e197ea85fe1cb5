"""Looking at the batches that are trained on next without taking them from the training."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_cco.compat.lightning_loaders import (
    Stateful,
    loader_of,
    loader_states,
    reload_if_due,
    replace_loader_states,
    set_loader_of,
    set_sampler_epoch,
    training_fetcher,
    training_loader,
)
from lightning_cco.errors import CCOWarning
from lightning_cco.spare_loader import draws_by_a_known_order, read_apart, spare_loader, watching_random

_KEPT_BYTES = 1 << 30
"""How much memory the batches that were drawn early may take until they are trained on."""

_quiet: weakref.WeakSet[CombinedLoader] = weakref.WeakSet()
"""Loaders that have loaded a batch, and drew no random numbers in this process for it."""

_Item = tuple[Any, int, int]
"""What a `CombinedLoader` gives: batch, its index, and that of its loader."""


class Lookahead:
    """Stands in front of the Trainer's own iterator: what was drawn early comes first, then the rest.

    So each batch is drawn once, in the order and from the iterator of a run without anybody looking ahead, whatever kind of loader it is.

    Args:
        fetcher: The fetcher of the training loop; its iterator has been begun.
        again: Whether the loop begins to iterate once more before its next batch. The iteration begun here is then the one that it gets.
        before: An iteration that has nothing left, which the loop finds out before it begins this one.

    Attributes:
        following: The iteration that the loop begins when this one, which has nothing left, is over.
        kept: What was drawn and not yet given to the training.
        exhausted: Whether nothing more comes.
        uses_random: Whether loading a batch draws from this process's global random state.
    """

    def __init__(self, fetcher: Any, again: bool, before: Lookahead | None = None) -> None:
        self.fetcher = fetcher
        self.combined: CombinedLoader = fetcher.combined_loader if before is None else before.combined
        self.kept: deque[_Item] = deque()
        self.exhausted = self.uses_random = False
        self.following: Lookahead | None = None
        waiting = loader_of(fetcher)
        if again:
            set_loader_of(fetcher, self.combined)
            iter(fetcher)
        assert fetcher.iterator is not None
        self.source: Iterator[_Item] = fetcher.iterator
        self._stateful = any(isinstance(loader, Stateful) for loader in self.combined.flattened)
        self._states: deque[Any] = deque()
        prefetched: list[_Item] = getattr(fetcher, "batches", [])
        self._remember_place()
        if again:
            for item in prefetched:
                self.kept.append(item)
                self._remember_place()
            set_loader_of(fetcher, _Begun(self))
            if before is not None:
                before.following = self
                fetcher.iterator = before
                prefetched.clear()
                if isinstance(waiting, _Begun):
                    waiting.then = loader_of(fetcher)
                    set_loader_of(fetcher, waiting)
        else:
            fetcher.iterator = self
        if self._stateful:
            # A checkpoint holds the place of what is trained on, not of what was drawn.
            replace_loader_states(self.combined, self._place)

    def __iter__(self) -> Lookahead:
        return self

    def __next__(self) -> _Item:
        """The next batch for the training."""
        if not self.kept:
            if self.exhausted:
                raise StopIteration
            self._step_aside()
            return next(self.source)
        item = self.kept.popleft()
        if self._states:
            self._states.popleft()
        if not self.kept and not self.exhausted:
            self._step_aside()
        return item

    @property
    def in_front(self) -> bool:
        """Whether the training loop still reads from here, or will."""
        return self.fetcher.iterator is self or isinstance(loader_of(self.fetcher), _Begun)

    @property
    def upcoming(self) -> list[_Item]:
        """What is known of the batches to come: those in the fetcher's hands already, then those kept here."""
        held = getattr(self.fetcher, "batches", []) if self.fetcher.iterator is self else []
        return [*held, *self.kept]

    @property
    def kept_bytes(self) -> int:
        """Memory of the batches kept."""
        return sum(_bytes(item[0]) for item in self.kept)

    def draw(self) -> bool:
        """Draw one batch more.

        Returns:
            Whether there was one.
        """
        if self.exhausted:
            return False
        try:
            self.kept.append(next(self.source))
        except StopIteration:
            self.exhausted = True
            return False
        self._remember_place()
        return True

    def _remember_place(self) -> None:
        if self._stateful:
            self._states.append(copy.deepcopy(loader_states(self.combined)))

    def _place(self) -> list[dict[str, Any]]:
        return list(self._states[0] if self._states and self.in_front else loader_states(self.combined))

    def _step_aside(self) -> None:
        if self.fetcher.iterator is self:
            self.fetcher.iterator = self.source
        replace_loader_states(self.combined, None)


class _Begun:
    """In the place of a loader until it is iterated the next time, which gives the iteration that was begun."""

    def __init__(self, lookahead: Lookahead) -> None:
        self._lookahead = lookahead
        self.then: Any = lookahead.combined

    def __iter__(self) -> Lookahead:
        set_loader_of(self._lookahead.fetcher, self.then)
        return self._lookahead

    def __len__(self) -> int:
        return len(self._lookahead.combined)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lookahead.combined, name)


def look_ahead(trainer: pl.Trainer, begun: int | None = None) -> tuple[Lookahead, float]:
    """The lookahead of the training loop, made at the first call, and how many batches the epoch that begins, or runs, still has.

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
    current = fetcher.iterator if isinstance(fetcher.iterator, Lookahead) else getattr(loader_of(fetcher), "_lookahead", None)
    if isinstance(current, Lookahead) and current.in_front:
        return current.following or current, left
    for loader in combined.flattened if begun is None else ():
        set_sampler_epoch(loader, epoch)
    lookahead = Lookahead(fetcher, again)
    if epoch_loop.restarting and any(isinstance(loader, Stateful) for loader in combined.flattened) and not lookahead.draw():
        # The place in a checkpoint was behind the last batch: an epoch without batches comes, then another iteration.
        lookahead, left = Lookahead(fetcher, again=True, before=lookahead), trainer.num_training_batches
    return lookahead, left


def warn_of_left_over(trainer: pl.Trainer) -> None:
    """Say at the end of an epoch, if it ended early, what was drawn from a stream and not trained on."""
    fetcher = training_fetcher(trainer)
    lookahead = fetcher.iterator if fetcher is not None else None
    if isinstance(lookahead, Lookahead) and lookahead.kept and spare_loader(trainer, lookahead.combined) is None:
        warnings.warn(
            f"The epoch ended before {len(lookahead.kept)} batches of the training loader that the calibration had drawn were trained on. A stream that "
            "gives each sample once has lost them. Set training_settings.stats_steps to at most the number of batches in an epoch.",
            CCOWarning,
            stacklevel=2,
        )


def upcoming_batches(trainer: pl.Trainer, count: int, begun: int | None = None) -> Iterator[Any]:
    """The batches that the training loop gets next, at most ``count``; copies, so that whatever is done to them, the training sees none of it.

    In the midst of an epoch ``begun`` says how many of its batches the loop has begun with. There even one batch that draws random numbers would be drawn
    before a step that draws some, so only loaders that were seen to draw none are read ahead.

    They are drawn from the training's own iterator and given back to it. That changes nothing where the order of random numbers doesn't matter: in worker
    processes, and for data without global random numbers. Else (a dataset that augments in this process; a sampler of one's own, which may heed what was
    trained), and where the batches would take too much memory, the further batches come from a copy of the loaders. Streams can't be copied: theirs are
    always drawn early, and fewer of them if they are large.
    """
    lookahead, left = look_ahead(trainer, begun)
    spare = spare_loader(trainer, lookahead.combined)
    if spare is None and trainer.max_steps >= 0:  # what a stream gives and nobody trains on is lost
        left = min(left, max(1, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches))
    count = int(min(count, left))
    quiet = lookahead.combined in _quiet if begun is not None else not _validates_first(trainer)
    draws = spare is None or (draws_by_a_known_order(lookahead.combined) and quiet)
    while draws and len(lookahead.upcoming) < count and lookahead.kept_bytes < _KEPT_BYTES:
        if spare is not None and lookahead.uses_random:
            break
        with watching_random(lookahead.combined) as used:
            if not lookahead.draw():
                break
        lookahead.uses_random |= bool(used)
        (_quiet.discard if lookahead.uses_random else _quiet.add)(lookahead.combined)
    early = [item[0] for item in lookahead.upcoming[:count]]
    more = spare is not None and not lookahead.exhausted and len(early) < count
    rest = islice(read_apart(spare), len(early), count) if spare is not None and more else iter(())
    return (copied(batch) for batch in chain(early, rest))


def _validates_first(trainer: pl.Trainer) -> bool:
    """Whether the loop begins a validation, which draws random numbers, before its next batch: behind the last batch of an epoch."""
    epoch_loop = trainer.fit_loop.epoch_loop
    return bool(epoch_loop.restarting and epoch_loop.batch_progress.is_last_batch and trainer.enable_validation)


def copied(batch: Any) -> Any:
    """A batch that may be written to."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # tensors with a history, open files
        return apply_to_collection(batch, Tensor, lambda tensor: tensor.detach().clone())


def _bytes(batch: Any) -> int:
    sizes: list[int] = []
    apply_to_collection(batch, (Tensor, np.ndarray), lambda item: sizes.append(item.nbytes))
    return sum(sizes)
