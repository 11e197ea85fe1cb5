"""An iterator that a model holds: what is drawn from it while the model is only looked at comes again."""

from __future__ import annotations

import copy
import io
from collections import deque
from collections.abc import Iterator, MutableMapping
from typing import Any


class ReplayedIterator:
    """Gives first what was drawn before, then the rest; in all else it is the iterator.

    Args:
        iterator: What is left.
        items: What was drawn from it, in order.
    """

    def __init__(self, iterator: Iterator[Any], items: deque[Any]) -> None:
        self._iterator, self._items = iterator, items

    def __iter__(self) -> ReplayedIterator:
        return self

    def __next__(self) -> Any:
        return self._items.popleft() if self._items else next(self._iterator)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._iterator, name)


class RecordingIterator(ReplayedIterator):
    """Stands in for an iterator, gives copies, and keeps what it gave."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        super().__init__(iterator, deque())

    def __next__(self) -> Any:
        item = next(self._iterator)
        self._items.append(item)
        try:
            return copy.deepcopy(item)
        except Exception:  # such as tensors with a history
            return item

    def rest(self) -> Iterator[Any]:
        """What replaces the iterator from now on."""
        if self._items and type(self._iterator) is ReplayedIterator:
            self._iterator._items.extendleft(reversed(self._items))
            return self._iterator
        return ReplayedIterator(self._iterator, self._items) if self._items else self._iterator


def is_iterator(value: Any) -> bool:
    """Whether a value gives each of its items once."""
    return hasattr(type(value), "__next__") and hasattr(type(value), "__iter__") and not isinstance(value, io.IOBase)


def put_back(attributes: MutableMapping[str, Any], name: str, recording: RecordingIterator) -> None:
    """Put what gives the drawn values again in the place of an iterator."""
    attributes[name] = recording.rest()
