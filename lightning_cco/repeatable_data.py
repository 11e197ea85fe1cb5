"""Telling streams that give the same samples again from those that give each sample once."""

from __future__ import annotations

import dis
import io
import pickle
import sys
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lightning_cco.graph.global_state import is_own_code
from lightning_cco.graph.replayed_iterators import is_iterator

_READING = {
    "csv",
    "glob",
    "gzip",
    "json",
    "pathlib",
    "zlib",
    "_io",
    "_csv",
    "PIL",
    "pandas",
    "pyarrow",
    "torch",
    "torchaudio",
    "torchvision",
}
_COMPUTING = {
    "bisect",
    "collections",
    "copy",
    "functools",
    "heapq",
    "itertools",
    "math",
    "numbers",
    "numpy",
    "operator",
    "random",
    "_random",
    "re",
    "scipy",
}
_LANGUAGE = {"abc", "builtins", "dataclasses", "enum", "logging", "string", "time", "typing", "typing_extensions", "warnings"}
_WITHOUT_CONSEQUENCES = _READING | _COMPUTING | _LANGUAGE
"""Packages by which data are read and computed; none of them takes something away, as clients of queues and services do."""


def gives_again(value: Any) -> bool:
    """Whether a twin of a stream gives what the stream would give: it holds no iterator, queue, open file, socket or the like, of which there is only one.

    >>> import queue
    >>> gives_again([1, 2]), gives_again(iter([1, 2])), gives_again({"from": queue.SimpleQueue()})
    (True, False, False)
    """
    try:
        _Holds(_Nowhere(), protocol=5, buffer_callback=lambda _: None).dump(value)
    except Exception:  # what can't be pickled is not data
        return False
    return True


def reads_without_consequences(value: Any) -> bool:
    """Whether a stream gives again, see `gives_again`, and is of the user's own code that names no package which might take a sample from somewhere for good.

    >>> class Lines:
    ...     def __iter__(self):
    ...         import socket
    ...         return iter(socket.socket().makefile())
    >>> gives_again(Lines()), reads_without_consequences(Lines())
    (True, False)
    """
    try:
        _OnlyReads(_Nowhere(), protocol=5, buffer_callback=lambda _: None).dump(value)
    except Exception:  # what can't be pickled, or may have consequences
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
            found = [item for function in functions for item in self._named_by(function)]
        return tuple, (found,)

    def _named_by(self, function: FunctionType) -> list[Any]:
        return _named_by(function)


class _OnlyReads(_Holds):
    """Fails, too, at a stream of a package's, and at code that names packages which may do more than read."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, IterableDataset) and not is_own_code(type(value)):
            raise TypeError("a stream of a package's")
        named = value if isinstance(value, (type, BuiltinFunctionType, FunctionType, ModuleType)) else type(value)
        package = (named.__name__ if isinstance(named, ModuleType) else named.__module__ or "").partition(".")[0]
        if package not in _WITHOUT_CONSEQUENCES and (isinstance(named, ModuleType) or not is_own_code(named)):
            raise TypeError(f"{package} may do more than read")
        return super().reducer_override(value)

    def _named_by(self, function: FunctionType) -> list[Any]:
        if is_own_code(function):
            unknown = {name.partition(".")[0] for code in _codes(function.__code__) for name in _imported(code)} - _WITHOUT_CONSEQUENCES
            names = {name for code in _codes(function.__code__) for name in code.co_names}
            if unknown or names & {"input", "unlink", "rename"}:
                raise TypeError("its code imports, or calls, what may do more than read")
        return super()._named_by(function)


def _named_by(function: FunctionType) -> list[Any]:
    """What the code of a user's function refers to outside of it."""
    found = [cell.cell_contents for cell in function.__closure__ or ()]
    package = (function.__module__ or "").partition(".")[0]
    if package in sys.stdlib_module_names or "site-packages" in function.__code__.co_filename:
        return found
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    return found + [function.__globals__[name] for name in names if name in function.__globals__]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A code, and those of the functions that are written in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _imported(code: CodeType) -> list[str]:
    return [str(item.argval) for item in dis.get_instructions(code) if item.opname == "IMPORT_NAME"]
