"""A speed's part of the integer program: who runs in integers, and which conversions that takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from lightning_cco.budget.layer_times import FLOAT, INT8
from lightning_cco.budget.option import INTEGER, Option
from lightning_cco.budget.speed import Passed, SpeedModel

Row = tuple[dict[int, float], float, float]
"""A row of the program: coefficients by column, least and largest sum."""


class SpeedRows:
    """A speed's part of the integer program. Sums of columns are mappings of coefficients, and the number that is added to them.

    Attributes:
        rows: Its rows.
        seconds: Seconds by column.
        fixed: Seconds whatever is chosen.
        whole: For each of its columns whether it must be an integer (1), or is one automatically at the optimum (0).
    """

    def __init__(self, model: SpeedModel, columns: Mapping[int, Sequence[tuple[int, Option]]], first: int) -> None:
        self.model, self.columns, self.first = model, columns, first
        self.rows: list[Row] = []
        self.seconds: dict[int, float] = {}
        self.fixed = 0.0
        self.whole: list[int] = []
        self.behind: dict[int, tuple[dict[int, float], float]] = {}
        self.follower = {number: self._new(1) for number, unit in enumerate(model.units) if unit.follows}
        for number, unit in enumerate(model.units):
            if unit.group is not None:
                for column, option in self.columns[unit.group]:
                    self.seconds[column] = self.seconds.get(column, 0.0) + model.option_seconds(number, option)
            elif unit.follows:
                self.seconds[self.follower[number]] = model.time_of(number, INT8) - model.time_of(number, FLOAT)
                self.fixed += model.time_of(number, FLOAT)
            else:
                self.fixed += model.time_of(number, INT8 if unit.integer else FLOAT)
        self.readers = model.readers()
        for number in self.follower:
            self._follow(number, self.readers[number])
        for tensor in model.tensors:
            self._convert(tensor)

    def loops(self, options: Sequence[Option], values: Sequence[float]) -> list[Row]:
        """What forbids followers of a solution that keep each other in integers with nothing else that does: they need support from outside.

        Such sets are rare, and there are as many as subsets, so they are forbidden when they come up.
        """
        planned = self.model.planned(options)
        held = {number for number, column in self.follower.items() if values[column] > 0.5 and not planned[number]}
        if not held:
            return []
        outside = [self._planned(other) for n in held if not self.model.units[n].only_behind for other in self._support(n, held, planned)]
        outside += [self.behind[n] for n in held if not held.intersection(self.model.units[n].sources)]
        before = len(self.rows)
        for number in held:
            self._row([(1.0, self._planned(number)), *((-1.0, other) for other in outside)], 0.0)
        return self.rows[before:]

    def _support(self, number: int, held: set[int], planned: Sequence[bool]) -> list[int]:
        """Units outside of a set of which one must run in integers that a member does for the sake of what reads it: readers, or parts of what it reads."""
        touching = [other for other in self.model.units[number].touching or () if other not in held]
        if self.model.units[number].touching is not None and not any(planned[other] for other in touching):
            return touching
        return [other for other in self.readers[number] if other not in held]

    def _new(self, whole: int) -> int:
        self.whole.append(whole)
        return self.first + len(self.whole) - 1

    def _planned(self, number: int | None, computed: bool = False) -> tuple[dict[int, float], float]:
        """Whether a unit reads and makes rounded tensors, or ``computed`` in integers."""
        if number is None:
            return {}, 0.0
        unit = self.model.units[number]
        if unit.group is not None:
            fitting = [
                column
                for column, option in self.columns[unit.group]
                if option.form == INTEGER and (not computed or self.model.form(option) == INT8)
            ]
            return dict.fromkeys(fitting, 1.0), 0.0
        return ({self.follower[number]: 1.0}, 0.0) if unit.follows else ({}, float(unit.integer))

    def _row(self, parts: Iterable[tuple[float, tuple[dict[int, float], float]]], most: float) -> None:
        """A sum of multiples that is at most a number."""
        entries: dict[int, float] = {}
        for factor, (columns, number) in parts:
            most -= factor * number
            for column, value in columns.items():
                entries[column] = entries.get(column, 0.0) + factor * value
        self.rows.append((entries, -math.inf, most))

    def _follow(self, number: int, readers: Sequence[int]) -> None:
        """A follower runs in integers if all that it reads does, or one that reads it does (and a part of what it reads)."""
        unit = self.model.units[number]
        own, behind = ({self.follower[number]: 1.0}, 0.0), ({self._new(0): 1.0}, 0.0)
        self.behind[number] = behind
        sources = [self._planned(source) for source in unit.sources]
        if not sources:
            self._row([(1.0, behind)], 0.0)
        for source in sources:
            self._row([(1.0, behind), (-1.0, source)], 0.0)
        if sources:
            self._row([*((1.0, source) for source in sources), (-1.0, behind)], len(sources) - 1.0)
        after = [] if unit.only_behind else [self._planned(reader) for reader in readers]
        if after and unit.touching is not None:
            after = [self._both(after, [self._planned(source) for source in unit.touching])]
        for other in [behind, *after]:
            self._row([(1.0, other), (-1.0, own)], 0.0)
        self._row([(1.0, own), (-1.0, behind), *((-1.0, other) for other in after)], 0.0)

    def _both(
        self, some: Sequence[tuple[dict[int, float], float]], others: Sequence[tuple[dict[int, float], float]]
    ) -> tuple[dict[int, float], float]:
        """Whether one of these and one of those runs in integers."""
        found = ({self._new(0): 1.0}, 0.0)
        for one in some:
            for other in others:
                self._row([(1.0, one), (1.0, other), (-1.0, found)], 1.0)
        for several in (some, others):
            self._row([(1.0, found), *((-1.0, one) for one in several)], 0.0)
        return found

    def _convert(self, tensor: Passed) -> None:
        """A tensor that is rounded is converted where its maker is in float, and back where a reader is."""
        if not tensor.entering and not tensor.leaving:
            return
        rounded = ({self._new(0): 1.0}, 0.0)
        makes = [] if tensor.float_output else [self._planned(tensor.maker)]
        for other in [*makes, *(self._planned(reader) for reader in tensor.readers if reader is not None)]:
            self._row([(1.0, other), (-1.0, rounded)], 0.0)
        if tensor.entering:
            enters = self._cost(tensor.entering)
            self._row([(1.0, rounded), (-1.0, self._planned(tensor.maker, computed=True)), (-1.0, enters)], 0.0)
        if tensor.leaving:
            leaves = self._cost(tensor.leaving)
            for reader in tensor.readers:
                wants = self._planned(reader) if tensor.at_readers else rounded
                self._row([(1.0, wants), (-1.0, self._planned(reader, computed=True)), (-1.0, leaves)], 0.0)

    def _cost(self, seconds: float) -> tuple[dict[int, float], float]:
        column = self._new(0)
        self.seconds[column] = seconds
        return {column: 1.0}, 0.0
