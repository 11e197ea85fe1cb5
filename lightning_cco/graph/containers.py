"""Tensors in what is passed around: arguments of a call, batches, what a forward returns."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Set
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

LOOKED_INTO = (
    "tuples, lists, sets, mappings (UserDict, BatchEncoding and OrderedDict too), named tuples, dataclasses, "
    "and the attributes and __slots__ of any other object"
)
"""Where `tensors_held` finds tensors, in words."""

_DEEPEST = 8
_SPARSE = frozenset((torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc))
_LEAVES = (
    str,
    bytes,
    int,
    float,
    complex,
    type,
    ModuleType,
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    nn.Module,
    torch.dtype,
    torch.device,
)


def tensors_in(value: Any, slot: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Tensor]]:
    """Every tensor in nested tuples, lists, mappings and dataclasses, with the way to it: what torch functions take and return.

    >>> [slot for slot, _ in tensors_in({"a": torch.zeros(1), "b": [torch.zeros(1), 2]})]
    [('a',), ('b', 0)]
    """
    if isinstance(value, Tensor):
        return [(slot, value)]
    found: list[tuple[tuple[Any, ...], Tensor]] = []
    if isinstance(value, (tuple, list)):
        for position, item in enumerate(value):
            found += tensors_in(item, (*slot, position))
    elif isinstance(value, dict):
        for key, item in value.items():
            found += tensors_in(item, (*slot, key))
    elif hasattr(value, "__dataclass_fields__"):
        for key in value.__dataclass_fields__:
            found += tensors_in(getattr(value, key, None), (*slot, key))
    return found


def tensors_held(value: Any) -> list[tuple[tuple[Any, ...], Tensor]]:
    """Every tensor that a batch or a result holds, whatever its classes, each once and with the way to it; see `LOOKED_INTO`.

    >>> from types import SimpleNamespace
    >>> [way for way, _ in tensors_held([SimpleNamespace(x=torch.zeros(1), y="a name")])]
    [(0, 'x')]
    """
    found: list[tuple[tuple[Any, ...], Tensor]] = []
    _collect(value, (), found, {}, _DEEPEST)
    return found


def bytes_of(tensor: Tensor) -> int:
    """How much memory the values of a tensor take, also where it is sparse or nested.

    >>> bytes_of(torch.eye(4)), bytes_of(torch.eye(4).to_sparse())
    (64, 16)
    """
    if tensor.is_nested:
        return sum(map(bytes_of, tensor.unbind()))
    if tensor.layout in _SPARSE:
        return (tensor.coalesce() if tensor.layout is torch.sparse_coo else tensor).values().nbytes
    return tensor.nbytes


def _collect(value: Any, way: tuple[Any, ...], found: list[tuple[tuple[Any, ...], Tensor]], seen: dict[int, Any], depth: int) -> None:
    if id(value) in seen or value is None or (isinstance(value, _LEAVES) and not isinstance(value, tuple)):
        return
    seen[id(value)] = value  # kept alive: what a property makes would give its id back
    if isinstance(value, Tensor):
        found.append((way, value))
    elif depth:
        for key, item in _items(value):
            _collect(item, (*way, key), found, seen, depth - 1)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """What an object holds, by key, position or attribute."""
    if isinstance(value, Mapping):
        yield from list(value.items())
    elif isinstance(value, (tuple, list, deque, Set)):
        yield from zip(getattr(value, "_fields", range(len(value))), list(value), strict=False)
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            name = f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)
    yield from list(getattr(value, "__dict__", {}).items())
