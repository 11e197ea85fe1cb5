"""Where tensors come from: which call made each, and which calls have since written to its memory.

A tensor that is written to through a view of it (``out[i, :, :h].copy_(image)``) holds the values of those calls too, so each write is kept with the
part of memory that it changed. What nobody has noted is looked for in the memory of tensors that are known.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cco.compat.torch_modes import functorch_value, is_functorch_wrapped

Origin = Any
"""A pair of call and output number; the names of the parameters that a constant is made of; or a custom function that still runs."""


DRAWN = "\0drawn"
"""Stands among the names of what a constant is made of for weights that the forward itself draws at random."""


def is_constant(origin: Origin) -> bool:
    """Whether a tensor is made of parameters and constants alone."""
    return isinstance(origin, tuple) and (not origin or isinstance(origin[0], str))


def _named(origin: tuple[str, ...]) -> bool:
    return any(name != DRAWN for name in origin)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor itself below the transformations of `torch.func`."""
    while is_functorch_wrapped(tensor):
        tensor = functorch_value(tensor)
    return tensor


@dataclass(frozen=True)
class _Known:
    tensor: weakref.ref[Tensor]
    origin: Origin
    time: int
    memory: int | None


@dataclass(frozen=True)
class _Write:
    time: int
    origin: Origin
    place: _Place
    whole: bool


@dataclass(frozen=True)
class _Place:
    """A part of memory, in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item: int

    @property
    def span(self) -> int:
        """How many elements lie between the first and the last, both included."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)) if all(self.shape) else 0

    def overlaps(self, other: _Place) -> bool:
        """Whether two parts of one memory have an element in common."""
        if self.item != other.item:
            return True
        if self.offset >= other.offset + other.span or other.offset >= self.offset + self.span:
            return False
        dense = [torch.Size(place.shape).numel() == place.span for place in (self, other)]
        if all(dense):
            return True
        start = min(self.offset, other.offset)
        taken = torch.zeros(max(self.offset + self.span, other.offset + other.span) - start, dtype=torch.bool, device="cpu")
        taken.as_strided(self.shape, self.strides, self.offset - start).fill_(True)
        return bool(taken.as_strided(other.shape, other.strides, other.offset - start).any())


class Origins:
    """What is known of the tensors of one forward."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._in_memory: dict[int, weakref.ref[Tensor]] = {}
        self._writes: dict[int, list[_Write]] = {}
        self._time = 0

    def remember(self, tensor: Tensor, origin: Origin) -> None:
        """Note where a tensor comes from, as it is now. A parameter is that parameter still, whatever constants are written to it (moving averages).

        One that the forward makes has no name, and gets those of what is written to it.
        """
        if isinstance(tensor, nn.Parameter) and is_constant(origin):
            known = self._entry(tensor)
            origin = known.origin if known is not None and is_constant(known.origin) and _named(known.origin) else origin
        while True:
            memory = _memory(tensor)
            known = _Known(weakref.ref(tensor), origin, self._time, memory)
            self._known[id(tensor)] = known
            if memory is not None:
                self._in_memory[memory] = known.tensor
            inner = tensor
            if is_functorch_wrapped(tensor):
                inner = functorch_value(tensor)
            if inner is tensor:
                return
            tensor = inner

    def of(self, tensor: Tensor) -> Origin:
        """Where a tensor was made, whatever has been written to it since; `None` if nobody has noted it."""
        known = self._entry(tensor)
        return None if known is None else known.origin

    def alive(self) -> list[tuple[Tensor, Origin]]:
        """The tensors that somebody still holds, and where they come from."""
        found = [(known.tensor(), known.origin) for known in self._known.values()]
        return [(tensor, origin) for tensor, origin in found if tensor is not None]

    def _entry(self, tensor: Tensor) -> _Known | None:
        for one in (tensor, unwrapped(tensor)):
            known = self._known.get(id(one))
            if known is not None and known.tensor() is one and (known.memory == _memory(one) or isinstance(one, nn.Parameter)):
                return known  # which ``set_`` has not given other memory since
        return None

    def note_write(self, tensor: Tensor, origin: Origin, whole: bool = False) -> None:
        """Note that a call has changed what a tensor holds. For the tensor itself that call is then where it comes from.

        Args:
            tensor: The tensor.
            origin: Where the call's result comes from.
            whole: Whether nothing is left of what it held before.
        """
        self._time += 1
        memory = _memory(tensor)
        if memory is not None:
            self._writes.setdefault(memory, []).append(_Write(self._time, origin, _place(tensor), whole))

    def writes_since(self, tensor: Tensor) -> list[Origin]:
        """The origins of what was written to a tensor, through other tensors, since it was noted."""
        return self._written(tensor)[0]

    def all_of(self, tensor: Tensor) -> list[Origin]:
        """The origins of what a tensor holds now: of itself, and of what was written to it since, which may leave nothing of the first."""
        writes, whole = self._written(tensor)
        return writes if whole else [self.of(tensor), *writes]

    def _written(self, tensor: Tensor) -> tuple[list[Origin], bool]:
        known, memory = self._entry(tensor), _memory(tensor)
        writes = None if known is None or memory is None else self._writes.get(memory)
        if known is None or not writes or writes[-1].time <= known.time:
            return [], False
        place = _place(tensor)
        found: list[Origin] = []
        whole = False
        for write in reversed(writes):
            if write.time <= known.time or whole:
                break
            if write.origin not in found and write.place.overlaps(place):
                found.append(write.origin)
            whole = write.whole and write.place == place
        return found[::-1], whole

    def sharing_memory(self, tensor: Tensor) -> Tensor | None:
        """A known tensor in the memory of one that is not known: what was made of it out of sight, as NumPy does, or in a script."""
        memory = _memory(tensor)
        reference = self._in_memory.get(memory) if memory is not None else None
        other = reference() if reference is not None else None
        return other if other is not None and other is not tensor and _memory(other) == memory else None


def _memory(tensor: Tensor) -> int | None:
    """The address of a tensor's memory; `None` where it has none of its own."""
    tensor = unwrapped(tensor)
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):  # sparse, nested and traced tensors
        return None


def _place(tensor: Tensor) -> _Place:
    tensor = unwrapped(tensor)
    return _Place(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size())
