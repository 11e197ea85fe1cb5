"""Reading and replacing tensors in a call's nested arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_cco.graph.call import ArgPath


def at(args: tuple[Any, ...], kwargs: dict[str, Any], slot: ArgPath) -> Any:
    """The value that a slot leads to."""
    value: Any = args[slot[0]] if isinstance(slot[0], int) else kwargs[slot[0]]
    for part in slot[1:]:
        value = value[part]
    return value


def replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], slot: ArgPath, change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with one tensor changed."""
    first, rest = slot[0], slot[1:]
    if not rest and isinstance(first, int):  # nearly always
        return (*args[:first], change(args[first]), *args[first + 1 :]), kwargs

    def put(value: Any, way: ArgPath) -> Any:
        if not way:
            return change(value)
        items = list(value)
        items[way[0]] = put(items[way[0]], way[1:])
        return tuple(items) if isinstance(value, tuple) else items

    if isinstance(first, int):
        return (*args[:first], put(args[first], rest), *args[first + 1 :]), kwargs
    return args, {**kwargs, first: put(kwargs[first], rest)}


_LONGEST, _NORM = 3, 4


def renormalized(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an embedding's call once its ``max_norm`` is dealt with: as in float, the parameter itself is renormalized, not a rounded copy."""
    longest = args[_LONGEST] if len(args) > _LONGEST else kwargs.get("max_norm")
    if longest is None:
        return args, kwargs
    norm = args[_NORM] if len(args) > _NORM else kwargs.get("norm_type", 2.0)
    indices, weight = (args[i] if len(args) > i else kwargs[name] for i, name in ((0, "input"), (1, "weight")))
    with torch.no_grad():
        torch.embedding_renorm_(weight.detach(), indices.contiguous(), longest, norm)
    if len(args) > _LONGEST:
        return (*args[:_LONGEST], None, *args[_LONGEST + 1 :]), kwargs
    return args, {**kwargs, "max_norm": None}
