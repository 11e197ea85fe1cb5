"""Calls of a model, and the arrays that its file is run on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lightning_cco.graph.containers import tensors_in

ForwardArguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one forward."""


def call_of(batch: Any) -> ForwardArguments:
    """The arguments that a batch gives: a mapping gives keyword arguments, a tuple or list positional ones, anything else the one argument."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def feeds_of(session: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays by the file's names of its inputs: keyword arguments by name, where they are single tensors, else in order."""
    names = [entry.name for entry in session.get_inputs()]
    named = {name: value for name, value in kwargs.items() if isinstance(value, Tensor) and name in names}
    others = [tensor for _, tensor in tensors_in([args, {name: value for name, value in kwargs.items() if name not in named}])]
    left = [name for name in names if name not in named]
    return {name: tensor.detach().cpu().numpy() for name, tensor in [*named.items(), *zip(left, others, strict=False)]}


def fits(session: Any, feeds: dict[str, np.ndarray[Any, Any]]) -> bool:
    """Whether arrays have the sizes that the file fixes: held batches may be of other lengths than the example."""
    return all(
        len(entry.shape) == feeds[entry.name].ndim
        and all(not isinstance(size, int) or size == given for size, given in zip(entry.shape, feeds[entry.name].shape, strict=True))
        for entry in session.get_inputs()
        if entry.name in feeds
    )
