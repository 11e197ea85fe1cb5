"""Data sets of which samples may be taken in this process without a trace: what they keep between samples is a copy, the samples themselves are not."""

from __future__ import annotations

import copy
import random
from collections import deque
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MOST_ITEMS = 1000
"""Items of a container beyond which they are samples, which nobody writes to."""


def data_apart(data: Any, shared: tuple[Any, ...] = ()) -> Any:
    """A twin of a data set with counters, caches, generators of random numbers and transforms of its own; arrays, tensors and what libraries hold are shared.

    Args:
        data: The data set.
        shared: Objects that the twin refers to, too.
    """
    return _apart(data, {id(item): item for item in shared})


def _apart(value: Any, seen: dict[int, Any]) -> Any:
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, (random.Random, np.random.RandomState, np.random.Generator)):
        twin = copy.deepcopy(value)
    elif isinstance(value, torch.Generator):
        twin = torch.Generator(value.device)
        twin.set_state(value.get_state())
    elif type(value) in (list, deque, set, dict, tuple):
        return _container(value, seen)
    elif _is_object(value):
        return _object(value, seen)
    else:
        return value
    seen[id(value)] = twin
    return twin


def _container(value: Any, seen: dict[int, Any]) -> Any:
    small = len(value) <= _MOST_ITEMS
    if isinstance(value, (tuple, set)):
        return type(value)(_apart(item, seen) for item in value) if small else copy.copy(value)
    seen[id(value)] = twin = copy.copy(value)
    if small:
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            twin[key] = _apart(item, seen)
    return twin


def _is_object(value: Any) -> bool:
    others = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, Tensor, np.ndarray, nn.Module)
    return isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, others)


def _object(value: Any, seen: dict[int, Any]) -> Any:
    try:
        twin = object.__new__(type(value))
    except TypeError:  # of a class written in C
        return value
    seen[id(value)] = twin
    for name, item in vars(value).items():
        twin.__dict__[name] = _apart(item, seen)
    return twin
