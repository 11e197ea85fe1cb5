"""Data sets of which samples may be taken in this process without a trace: what they keep between samples is a copy, the samples themselves are not."""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MOST_ITEMS = 1000
"""Items of a container beyond which they are samples, which nobody writes to."""

_GENERATORS = (random.Random, np.random.RandomState, np.random.Generator, torch.Generator)


class Apart:
    """Makes twins of data sets, collate functions and the like, which have counters, caches, generators of random numbers and transforms of their own.

    Arrays, tensors and what libraries hold are shared. Functions can't be kept from the names of their module, nor from attributes of classes: the generators
    among the names, and what the code itself keeps there, are put back by whoever calls them; see `generators` and `code`.

    Args:
        shared: Objects that the twins refer to, too.

    Attributes:
        code: The classes and the functions of the originals.
    """

    def __init__(self, shared: tuple[Any, ...] = ()) -> None:
        self._seen: dict[int, Any] = {id(item): item for item in shared}
        self._kept = list(shared)  # else an identity could be given again
        self._modules: dict[int, dict[str, Any]] = {}
        self.code: list[type | FunctionType] = []

    @property
    def generators(self) -> list[Any]:
        """The generators among the global names of the modules that the originals are of."""
        found = {id(value): value for names in self._modules.values() for value in list(names.values()) if isinstance(value, _GENERATORS)}
        return list(found.values())

    def twin(self, value: Any) -> Any:
        """Something that does the same, and leaves no trace in the original."""
        if id(value) in self._seen:
            return self._seen[id(value)]
        if isinstance(value, _GENERATORS):
            made = _generator(value)
        elif isinstance(value, (list, deque, set, dict, tuple)):
            return self._container(value) if type(value) in (list, deque, set, dict, tuple) else value
        elif isinstance(value, partial):
            made = partial(self.twin(value.func), *self._container(value.args), **self._container(value.keywords))
        elif isinstance(value, MethodType):
            made = MethodType(value.__func__, self.twin(value.__self__))
        elif isinstance(value, FunctionType):
            made = self._function(value)
        elif _is_object(value):
            return self._object(value)
        else:
            return value
        self._remember(value, made)
        return made

    def _remember(self, value: Any, made: Any) -> None:
        self._seen[id(value)] = made
        self._kept.append(value)

    def _container(self, value: Any) -> Any:
        small = len(value) <= _MOST_ITEMS
        if isinstance(value, (tuple, set)):
            return type(value)(self.twin(item) for item in value) if small else copy.copy(value)
        made = copy.copy(value)
        self._remember(value, made)
        if small:
            for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                made[key] = self.twin(item)
        return made

    def _function(self, function: FunctionType) -> Any:
        self._look_into(function.__module__, function.__globals__)
        self.code.append(function)
        if not function.__closure__:
            return function
        cells = []
        for cell in function.__closure__:
            try:
                cells.append(CellType(self.twin(cell.cell_contents)))
            except ValueError:  # it is empty
                cells.append(cell)
        made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells))
        made.__kwdefaults__ = function.__kwdefaults__
        return made

    def _object(self, value: Any) -> Any:
        try:
            made = object.__new__(type(value))
        except TypeError:  # of a class written in C
            return value
        self._remember(value, made)
        self.code.append(type(value))
        module = getattr(type(value), "__module__", "")
        self._look_into(module, getattr(sys.modules.get(module), "__dict__", {}))
        for name, item in vars(value).items():
            made.__dict__[name] = self.twin(item)
        return made

    def _look_into(self, module: str | None, names: dict[str, Any]) -> None:
        if (module or "").partition(".")[0] not in ("torch", "numpy", "random"):
            self._modules[id(names)] = names


def state_of_generator(generator: Any) -> Any:
    """The state of a generator of random numbers of any kind."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def set_generator(generator: Any, state: Any) -> None:
    """Let a generator go on from a state."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _generator(value: Any) -> Any:
    if not isinstance(value, torch.Generator):
        return copy.deepcopy(value)
    made = torch.Generator(value.device)
    made.set_state(value.get_state())
    return made


def _is_object(value: Any) -> bool:
    others = (type, BuiltinFunctionType, ModuleType, Tensor, np.ndarray, nn.Module)
    return isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, others)
