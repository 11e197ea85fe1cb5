"""Blocks (`with`) inside of which the runtime does something else: each holds for its thread or asynchronous task, and they may end in any order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class _Block:
    """One block, and whether it has ended."""

    def __init__(self, owner: Blocks, value: Any) -> None:
        self.owner, self.value, self.ended = owner, value, False


_ENTERED: ContextVar[tuple[_Block, ...]] = ContextVar("_ENTERED", default=())
"""The blocks of all owners that this thread or task is in."""


class Blocks:
    """What is done in the blocks of one owner.

    A block of a generator or of another task may end while a later one goes on; then that one's value holds, and in the end none. One that is closed
    in another thread has ended all the same.

    >>> blocks = Blocks()
    >>> first, second = blocks.within("first"), blocks.within("second")
    >>> first.__enter__(), second.__enter__(), first.__exit__(None, None, None)
    (None, None, False)
    >>> blocks.innermost("none"), second.__exit__(None, None, None), blocks.innermost("none")
    ('second', False, 'none')
    """

    def __init__(self) -> None:
        self.open: list[_Block] = []  # of all threads; empty but for the time of a block

    def innermost(self, otherwise: Any) -> Any:
        """The value of the innermost block that this thread or task is in."""
        for block in reversed(_ENTERED.get()):
            if block.owner is self and not block.ended:
                return block.value
        return otherwise

    @contextmanager
    def within(self, value: Any) -> Iterator[None]:
        """Be in a block with a value."""
        block = _Block(self, value)
        try:
            self.open.append(block)
            _ENTERED.set((*_ENTERED.get(), block))
            yield
        finally:
            block.ended = True
            if block in self.open:
                self.open.remove(block)
            _ENTERED.set(tuple(entered for entered in _ENTERED.get() if not entered.ended))
