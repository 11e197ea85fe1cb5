"""How containers, arrays, generators and tensors get back what they held."""

from __future__ import annotations

import copy
import io
import random
from array import array
from collections.abc import Callable
from functools import partial
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def undo_contents(container: Any, stays: Callable[[Any], bool]) -> Callable[[], None]:
    """What gives a container its items back.

    Args:
        container: A list, deque, set or dictionary, as it is now.
        stays: Whether an item that came in place of nothing stays.
    """
    if isinstance(container, dict):
        pairs = dict(dict.items(container))

        def undo_dict() -> None:
            wanted = {**pairs, **{key: value for key, value in dict.items(container) if pairs.get(key) is None and stays(value)}}
            if list(map(id, container)) != list(map(id, wanted)) or any(container[key] is not value for key, value in wanted.items()):
                dict.clear(container)
                dict.update(container, wanted)

        return undo_dict
    items = list(container)

    def undo() -> None:
        wanted = items
        if len(items) == len(container) and all(map(is_, items, container)):
            return
        if isinstance(container, list) and len(items) == len(container):
            wanted = [now if value is None and stays(now) else value for value, now in zip(items, container, strict=True)]
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(wanted)

    return undo


def undo_array(values: Any) -> Callable[[], None]:
    """What gives an array of NumPy's, Python's, or of bytes its values back."""
    before = copy.copy(values)

    def undo() -> None:
        values[... if isinstance(values, np.ndarray) else slice(None)] = before

    return undo


def undo_value(value: Any) -> Callable[[], None] | None:
    """What puts a generator of random numbers, an array of Python's, or a file in memory back; `None` for all else."""
    if isinstance(value, (random.Random, np.random.RandomState, np.random.Generator, torch.Generator)):
        return undo_generator(value)
    if isinstance(value, (array, bytearray)):
        return undo_array(value)
    return undo_file(value) if isinstance(value, (io.StringIO, io.BytesIO)) else None


def undo_file(file: io.StringIO | io.BytesIO) -> Callable[[], None]:
    """What gives a file in memory its contents and its place back."""
    if file.closed:
        return lambda: None
    before, place = file.getvalue(), file.tell()

    def undo() -> None:
        if not file.closed and (file.getvalue() != before or file.tell() != place):
            file.seek(0)
            file.truncate()
            file.write(before)  # type: ignore[arg-type]
            file.seek(place)

    return undo


def undo_generator(generator: Any) -> Callable[[], None]:
    """What lets a generator of random numbers go on from where it is now."""
    if isinstance(generator, np.random.Generator):
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    return partial(generator.set_state, generator.get_state())


def is_same(tensor: Tensor, value: Tensor) -> bool:
    """Whether a tensor has the shape, type and values of another, wherever that one is."""
    if tensor.shape != value.shape or tensor.dtype != value.dtype:
        return False
    value = value.to(tensor.device)
    return torch.equal(tensor, value) or _is_same_with_nan(tensor, value)


def _is_same_with_nan(tensor: Tensor, value: Tensor) -> bool:
    """The same where not a number stands in the same places, which equals nothing, not even itself."""
    if type(tensor) not in _PLAIN or not (tensor.is_floating_point() or tensor.is_complex()) or tensor.layout is not torch.strided:
        return False
    with torch.no_grad():
        bytes_of = [plain.detach().contiguous().reshape(-1).view(torch.uint8) for plain in (tensor, value)]
        return torch.equal(*bytes_of)


def restore(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor the shape and values of another, unless it has them."""
    if tensor.shape != value.shape or tensor.dtype != value.dtype:
        tensor.data = value.to(tensor.device)
    elif not is_same(tensor, value):
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():  # the first turns gradients on again
            tensor.copy_(value)
