"""Telling streams that give the same samples again from those that give each sample once."""

from __future__ import annotations

import io
import pickle
from types import FunctionType, ModuleType
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_cco.graph.global_state import is_own_code, names_in
from lightning_cco.graph.replayed_iterators import is_iterator

_WRITES = {"write", "writelines", "write_text", "write_bytes", "unlink", "remove", "rename", "truncate", "commit"}


def gives_again(value: Any) -> bool:
    """Whether a twin of a stream gives what the stream would give: it holds no iterator, queue, open file, socket or the like, of which there is only one.

    Code that writes to a file, or removes one, may keep its place there, and so takes samples away from whoever reads after it.

    >>> import queue
    >>> gives_again([1, 2]), gives_again(iter([1, 2])), gives_again({"from": queue.SimpleQueue()})
    (True, False, False)
    """
    try:
        _Holds(_Nowhere(), protocol=5, buffer_callback=lambda _: None).dump(value)
    except Exception:  # what can't be pickled is not data
        return False
    return True


class _Nowhere(io.RawIOBase):
    def write(self, data: Any) -> int:
        return len(data)


class _Holds(pickle.Pickler):
    """Goes through all that a value holds and its code names; fails at what exists once. Functions and classes need not be importable for it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._entered: set[int] = set()

    def reducer_override(self, value: Any) -> Any:
        if is_iterator(value):
            raise TypeError("an iterator")
        if value is tuple or not isinstance(value, (Tensor, nn.Module, type, ModuleType, pl.Trainer, FunctionType)):
            return NotImplemented
        found: list[Any] = []
        if isinstance(value, (type, FunctionType)) and id(value) not in self._entered:
            self._entered.add(id(value))
            functions = (
                [value] if isinstance(value, FunctionType) else [item for item in vars(value).values() if isinstance(item, FunctionType)]
            )
            found = [item for function in functions for item in _named_by(function)]
        return tuple, (found,)


def _named_by(function: FunctionType) -> list[Any]:
    """What the code of a user's function refers to outside of it; an error if it writes."""
    found = [cell.cell_contents for cell in function.__closure__ or ()]
    if not is_own_code(function):
        return found
    names = names_in(function.__code__)
    if not _WRITES.isdisjoint(names):
        raise TypeError("it writes")
    return found + [function.__globals__[name] for name in names if name in function.__globals__]
