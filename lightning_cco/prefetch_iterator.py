"""The iterator that gives a training first what was drawn early from its loaders, then the rest."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_cco.compat.lightning_loaders import (
    Stateful,
    loader_of,
    loader_states,
    replace_loader_states,
    set_loader_of,
)
from lightning_cco.data_settings import Settings, settings_of, warn_of_changes
from lightning_cco.errors import CCOWarning
from lightning_cco.graph.containers import bytes_of
from lightning_cco.random_numbers import DrawnEarly, RandomState

_Item = tuple[Any, int, int]
"""What a `CombinedLoader` gives: batch, its index, and that of its loader."""


class PrefetchIterator:
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
    """

    def __init__(self, fetcher: Any, again: bool, before: PrefetchIterator | None = None) -> None:
        self.fetcher = fetcher
        self.combined: CombinedLoader = fetcher.combined_loader if before is None else before.combined
        self.kept: deque[_Item] = deque()
        self.exhausted = False
        self.following: PrefetchIterator | None = None
        self._random = DrawnEarly()
        self._warned = False
        self._settings: Settings | None = None
        self._used: deque[bool] = deque()
        waiting = loader_of(fetcher)
        if again:
            set_loader_of(fetcher, self.combined)
            with self._random:
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
                self._used.append(self._random.used)
                self._remember_place()
            set_loader_of(fetcher, Begun(self))
            if before is not None:
                before.following = self
                fetcher.iterator = before
                prefetched.clear()
                if isinstance(waiting, Begun):
                    waiting.then = loader_of(fetcher)
                    set_loader_of(fetcher, waiting)
        else:
            fetcher.iterator = self
        if self._stateful:
            # A checkpoint holds the place of what is trained on, not of what was drawn.
            replace_loader_states(self.combined, self._place)

    def __iter__(self) -> PrefetchIterator:
        return self

    def __next__(self) -> _Item:
        """The next batch for the training."""
        if not self.kept:
            if self.exhausted:
                raise StopIteration
            self._step_aside()
            return next(self.source)
        if self._used.popleft():
            self._warn_unless_due()
        if self._settings is not None and warn_of_changes(self._settings, settings_of(self.combined), len(self.kept)):
            self._settings = None
        item = self.kept.popleft()
        if self._states:
            self._states.popleft()
        if not self.kept and not self.exhausted:
            self._step_aside()
        return item

    @property
    def in_front(self) -> bool:
        """Whether the training loop still reads from here, or will."""
        return self.fetcher.iterator is self or isinstance(loader_of(self.fetcher), Begun)

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
        before = RandomState()
        try:
            with self._random:
                self.kept.append(next(self.source))
        except StopIteration:
            self.exhausted = True
            return False
        self._used.append(bool(RandomState().differs(before)))
        self._settings = settings_of(self.combined)
        self._remember_place()
        return True

    def begin(self) -> PrefetchIterator:
        """The loop begins to iterate once more: what it gets."""
        if self._random.used:
            self._warn_unless_due()
        return self

    def _warn_unless_due(self) -> None:
        if self._warned or self._random.due:
            return
        self._warned = True
        warnings.warn(
            "The training loader draws random numbers in this process, and batches of it were drawn before their time, to calibrate on. Since then "
            "the model or a hook has drawn some, too (dropout, say), so order, augmentations and dropout have other random numbers than without CCOCallback. "
            "No sample is lost or repeated. For the same numbers load in worker processes (num_workers of at least 1), let the data draw from a "
            "generator of their own, or set training_settings.stats_steps and monitoring_settings.sensitivity_batches to 1.",
            CCOWarning,
            stacklevel=3,
        )

    def _remember_place(self) -> None:
        if self._stateful:
            self._states.append(copy.deepcopy(loader_states(self.combined)))

    def _place(self) -> list[dict[str, Any]]:
        return list(self._states[0] if self._states and self.in_front else loader_states(self.combined))

    def _step_aside(self) -> None:
        if self.fetcher.iterator is self:
            self.fetcher.iterator = self.source
        replace_loader_states(self.combined, None)


class Begun:
    """In the place of a loader until it is iterated the next time, which gives the iteration that was begun."""

    def __init__(self, prefetched: PrefetchIterator) -> None:
        self.prefetched = prefetched
        self.then: Any = prefetched.combined

    def __iter__(self) -> PrefetchIterator:
        set_loader_of(self.prefetched.fetcher, self.then)
        return self.prefetched.begin()

    def __len__(self) -> int:
        return len(self.prefetched.combined)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.prefetched.combined, name)


def _bytes(batch: Any) -> int:
    sizes: list[int] = []
    apply_to_collection(batch, (Tensor, np.ndarray), lambda item: sizes.append(bytes_of(item) if isinstance(item, Tensor) else item.nbytes))
    return sum(sizes)
