"""Tensors inside of containers: tuples, mappings, dataclasses, nested as a forward takes and gives them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

ArgPath = tuple[Any, ...]
"""The way to a value: keys, numbers and attributes."""


def items_of(value: Any) -> list[tuple[Any, Any]] | None:
    """What a container holds, by key; `None` if it is none."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return [(name, getattr(value, name, None)) for name in value.__dataclass_fields__]
    return None


def leaves(value: Any, slot: ArgPath = ()) -> list[tuple[ArgPath, Any]]:
    """Everything that is no container, with the way to it; without `None`."""
    items = items_of(value)
    if items is None:
        return [] if value is None else [(slot, value)]
    return [leaf for key, item in items for leaf in leaves(item, (*slot, key))]


def mapped(value: Any, change: Callable[[ArgPath, Tensor], Tensor], slot: ArgPath = ()) -> Any:
    """A copy with other tensors."""
    if isinstance(value, Tensor):
        return change(slot, value)
    items = items_of(value)
    if items is None or not any(isinstance(leaf, Tensor) for _, leaf in leaves(value)):
        return value
    changed = {key: mapped(item, change, (*slot, key)) for key, item in items}
    if type(value) is dict:
        return changed
    if isinstance(value, Mapping):
        try:
            return type(value)(**changed) if hasattr(value, "__dataclass_fields__") else type(value)(changed)  # type: ignore[call-arg]
        except TypeError:
            return changed
    if hasattr(value, "_fields"):
        return type(value)(*changed.values())
    if isinstance(value, (tuple, list)):
        return type(value)(changed.values())
    copied = copy.copy(value)
    for key, item in changed.items():
        object.__setattr__(copied, key, item)
    return copied


def follow(shapes: Any, slot: ArgPath) -> Any:
    """What nested specifications say of one tensor."""
    for key in slot:
        if isinstance(shapes, Mapping):
            shapes = shapes.get(key)
        elif isinstance(shapes, (tuple, list)) and isinstance(key, int) and key < len(shapes):
            shapes = shapes[key]
        else:
            return None
    return shapes


def name_of(slot: ArgPath) -> str:
    """A name for a tensor from the way to it."""
    return ".".join(map(str, slot))
