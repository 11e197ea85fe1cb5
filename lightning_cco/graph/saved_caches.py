"""What the user's code keeps behind `functools.lru_cache`, and in the environment of the process."""

from __future__ import annotations

import functools
import gc
import os
from collections import deque
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from lightning_cco.graph.containers import tensors_in
from lightning_cco.graph.global_state import Names, is_own_code, names_in

_CACHE = type(functools.lru_cache(int))


def is_cache(value: Any) -> bool:
    """Whether it is a function of the user's own whose results `functools.lru_cache` or `functools.cache` keeps."""
    return isinstance(value, _CACHE) and is_own_code(value.__wrapped__)


def held_by(cache: Any) -> list[Any]:
    """The results that a cache holds; arguments may be among them.

    >>> @functools.lru_cache
    ... def state(name):
    ...     return {"calls": 0}
    >>> state("a")["calls"] += 1
    >>> {"calls": 1} in held_by(state)
    True
    """
    if not cache.cache_info().currsize:
        return []
    parts = [part for part in gc.get_referents(cache) if part is not cache.__dict__ and not isinstance(part, (type, FunctionType))]
    if cache.cache_parameters()["maxsize"] is None:  # then it is a dictionary of them; else a list, which is looked up by one
        return [result for part in parts if isinstance(part, dict) for result in part.values()]
    return [part for part in parts if not (isinstance(part, dict) and any(type(item).__module__ == "functools" for item in part.values()))]


def undo_cache(cache: Any) -> Callable[[], None]:
    """What empties a cache that is empty now, if it then holds what a function may write to. Values and tensors stay: they are the same when made again."""
    empty = not cache.cache_info().currsize

    def undo() -> None:
        if empty and any(_may_be_written_to(value) for value in held_by(cache)):
            cache.cache_clear()

    return undo


def clear_cache(cache: Any) -> None:
    """Empty a cache that holds tensors, and nothing that may be written to: they are the same when made again, and what makes them is then seen."""
    held = held_by(cache)
    if tensors_in(held) and not any(_may_be_written_to(value) for value in held):
        cache.cache_clear()


def _may_be_written_to(value: Any) -> bool:
    return isinstance(value, (list, dict, set, deque, bytearray)) or (is_own_code(type(value)) and not isinstance(value, (type, nn.Module)))


def environment_of(function: FunctionType) -> Names | None:
    """The variables of the environment that a function names, as a mapping; `None` if it asks for none."""
    names = names_in(function.__code__)
    if names.isdisjoint(("environ", "getenv", "putenv")):
        return None
    values = (function.__globals__.get(name) for name in names)
    return Names(os.environ, _texts_in(function.__code__).union(value for value in values if isinstance(value, str)))


def _texts_in(code: CodeType) -> frozenset[str]:
    inner = (_texts_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(constant for constant in code.co_consts if isinstance(constant, str)).union(*inner)
