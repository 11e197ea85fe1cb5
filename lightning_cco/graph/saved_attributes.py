"""The attributes of an object, or the names that code knows, as they were, and how they are put back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_cco.compat.modules import CONTENTS
from lightning_cco.graph.containers import tensors_in

_MISSING = object()


@dataclass
class KeptAttributes:
    """What a mapping holds now, and what it held.

    Attributes:
        now: The mapping.
        before: What was in it.
        ignored: Names that are not looked at.
        stays: Whether what appears in it may stay.
    """

    now: MutableMapping[str, Any]
    before: dict[str, Any]
    ignored: frozenset[str]
    stays: bool

    @property
    def new(self) -> list[str]:
        """Names that were not there."""
        return [name for name in self.now if name not in self.before and name not in self.ignored]

    def appeared(self) -> Iterator[tuple[str, Any]]:
        """What is there in place of nothing, and may stay: modules and tensors. Whatever else there is may count, and is made again."""
        for name in (*self.new, *(name for name, value in self.before.items() if value is None)) if self.stays else ():
            value = self.now.get(name)
            if isinstance(value, nn.Module) or (value is not None and tensors_in(value)):
                yield name, value

    def restore(self, but: Collection[tuple[int, str]], is_constant: Callable[[Any], bool]) -> None:
        """Put everything back.

        Args:
            but: What stays, by the mapping's identity and the name.
            is_constant: Whether a value may stay where nothing was.
        """
        for name in self.new:
            if (id(self.now), name) not in but and not is_constant(self.now[name]):
                del self.now[name]
        parts = {name for kind in CONTENTS for name in self.now.get(kind, ())} if self.stays else set()
        for name, value in self.before.items():
            if name in parts:
                continue  # a module or a parameter that the forward has made stays: it is hooked
            if self.now.get(name, _MISSING) is value or (id(self.now), name) in but:
                continue
            if value is not None or not is_constant(self.now.get(name)):
                self.now[name] = value
