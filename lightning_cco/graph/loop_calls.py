"""The calls of one operation that a loop over modules makes in a frame: which of those of the capture one is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

_Place = TypeVar("_Place", int, str)

BITS = 16
"""Of a number: which call after a module; the bits above say after which."""


def segment_of(number: int) -> int:
    """After which module a number counts.

    >>> segment_of(3 << 16 | 2)
    3
    """
    return number >> BITS


@dataclass(frozen=True)
class Start:
    """From what a frame counts once it has called a module, and what it had called before it.

    Attributes:
        counts: By kind: the next number.
        calls: By path of a module that is called again and again: which call is next.
        before: By kind, of calls that the loop makes before each of its modules: after which module, and their place. Where a module is left out together
            with those before it, nothing tells them from those of the next one.
        calls_before: Likewise by path: how many calls.
    """

    counts: dict[str, int]
    calls: dict[str, int]
    before: dict[str, tuple[int, int]]
    calls_before: dict[str, int]


@dataclass
class LoopCalls:
    """Their numbers and their places in the user's code.

    A loop goes on past a module that is left out, and calls what it calls in each round: then there is no such call after the module before, but one after
    a later module.

    Attributes:
        places: For evaluation (`False`) and training (`True`): the place of each number.
        paired: The number in training of each one of evaluation.
    """

    places: dict[bool, dict[int, int]] = field(default_factory=lambda: {False: {}, True: {}})
    paired: dict[int, int] = field(default_factory=dict)

    def known(self, training: bool) -> dict[int, int]:
        """The place of each number; in training also of calls after modules that the capture left out there."""
        if not training:
            return self.places[False]
        return {**{number: place for number, place in self.places[False].items() if number not in self.paired}, **self.places[True]}

    def onward(self) -> frozenset[int]:
        """Places from which a call may be one after a later module: one of a round of the loop, not of a loop of its own within a round."""
        seen: dict[int, list[int]] = {}
        for number, place in self.places[False].items():
            seen.setdefault(place, []).append(segment_of(number))
        return frozenset(place for place, segments in seen.items() if place >= 0 and len({*segments}) == len(segments))

    def note_training(self, index: int, place: int) -> int:
        """The number of a call of the training's capture, which is next by its count."""
        trained, segment = self.places[True], segment_of(index)
        if trained.get(index) == place:
            return index
        at = sorted(number for number, other in self.places[False].items() if other == place)
        here = [number for number in at if segment_of(number) == segment and number not in self.paired]
        later = [number for number in at if segment_of(number) > segment] if place in self.onward() else []
        if here:
            self.paired[here[0]] = index
        elif later:
            index = self.paired[later[0]] = later[0]
        trained[index] = place
        return index

    def forget_training(self) -> None:
        """The training's capture has failed."""
        self.places[True].clear()
        self.paired.clear()


def number_of(known: Mapping[int, _Place], onward: frozenset[_Place], index: int, place: _Place) -> int | None:
    """The number of the captured call that one is; `None` if it is none.

    Args:
        known: The place of each number, -1 where it is unknown; in compiled code its line, empty where it is unknown.
        onward: Places of calls that may be those after a later module.
        index: Its number by the count.
        place: Its place in the user's code.

    >>> number_of({0: 8, 1 << 16: 9, 2 << 16: 9}, frozenset({8, 9}), 1 << 16 | 1, 9) == 2 << 16
    True
    """
    if known.get(index) in (-1, "", place):
        return index
    segment = segment_of(index)
    after = [number for number, at in known.items() if number > index and at == place]
    found = [number for number in after if segment_of(number) == segment or place in onward]
    return min(found, default=None)
