"""How fast a choice is: the times of its layers, and of the conversions where layers in float and in integers meet, as terms of the integer program."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_cco.budget.layer_times import FLOAT, INT8, PACKED, WEIGHT_ONLY
from lightning_cco.budget.option import FLOAT as IN_FLOAT
from lightning_cco.budget.option import INTEGER, Option
from lightning_cco.errors import CCOError

Row = tuple[dict[int, float], float, float]
"""A row of the program: coefficients by column, least and largest sum."""


@dataclass(frozen=True)
class Unit:
    """What an engine computes at once: a layer with what is fused to it.

    Attributes:
        name: Its last layer.
        layer: Its first.
        group: Number of the group whose option says how it runs; `None`: it has no weights to choose for.
        follows: Whether it runs as its neighbours do; else, without a group, always the same way.
        integer: How it runs then: in integers, or in float.
        sources: Units whose results it reads, by number, that engines hand over in integers; `None` among them: a float that is never rounded.
        only_behind: Whether only what it reads counts, not what reads it (clamps).
    """

    name: str
    layer: str = ""
    group: int | None = None
    follows: bool = False
    integer: bool = False
    sources: tuple[int | None, ...] = ()
    only_behind: bool = False


@dataclass(frozen=True)
class Passed:
    """A tensor that may be converted on its way.

    Attributes:
        maker: The unit that makes it.
        readers: Those that read it; `None`: the model's output.
        float_output: Whether a product hands it over in float at no cost, so that only what reads it rounds it.
        at_readers: Whether it is rounded for its readers in integers alone, so that others read it as it was.
        entering: Seconds of a conversion to integers behind its maker.
        leaving: Seconds of one to floats.
    """

    maker: int
    readers: tuple[int | None, ...]
    float_output: bool
    at_readers: bool
    entering: float
    leaving: float


@dataclass
class SpeedModel:
    """What any choice takes.

    Attributes:
        units: What is computed, in graph order.
        tensors: What passes between them.
        times: By unit the seconds in each form.
        packed: Whether weights of at most 4 bits are stored so.
        float_seconds: The model in float.
    """

    units: list[Unit]
    tensors: list[Passed]
    times: list[Mapping[str, float]]
    packed: bool = False
    float_seconds: float = field(init=False)

    def __post_init__(self) -> None:
        self.float_seconds = sum(self._time(number, FLOAT) for number in range(len(self.units)))

    def to_plain(self) -> dict[str, Any]:
        """Plain data, for the report page, which reckons with it too."""
        units = [
            {
                "layer": unit.layer,
                "chosen": unit.group is not None,
                "follows": unit.follows,
                "integer": unit.integer,
                "sources": list(unit.sources),
                "only_behind": unit.only_behind,
                "times": dict(times),
            }
            for unit, times in zip(self.units, self.times, strict=True)
        ]
        return {"float_seconds": self.float_seconds, "units": units, "tensors": [asdict(tensor) for tensor in self.tensors]}

    def form(self, option: Option) -> str:
        """How the engine computes an option."""
        if option.form == IN_FLOAT:
            return FLOAT
        if self.packed and option.weights <= 4:
            return PACKED
        return INT8 if option.form == INTEGER else WEIGHT_ONLY

    def _time(self, unit: int, form: str) -> float:
        """Seconds of a unit; NaN: it was not measured in this form."""
        known = self.times[unit]
        own = self.units[unit].group is not None
        return known.get(form, math.nan if own else next(iter(known.values()), 0.0))

    def option_seconds(self, unit: int, option: Option) -> float:
        """What a unit takes with an option of its group.

        Raises:
            CCOError: The table has no time of it.
        """
        found = self._time(unit, self.form(option))
        if math.isnan(found):
            raise CCOError(
                f"budget_settings.layer_times: the table has no time of '{self.units[unit].name}' in the form '{self.form(option)}'; it has "
                f"{', '.join(self.times[unit])}. Measure again, by leaving layer_times out."
            )
        return found

    def group_seconds(self, group: int, option: Option) -> float:
        """What the layers of a group take with an option, conversions apart."""
        form = self.form(option)
        return sum(self._time(number, form) for number, unit in enumerate(self.units) if unit.group == group)

    def shares(self, options: Sequence[Option]) -> list[tuple[str, float]]:
        """The part of a choice's time that each layer takes; conversions under a name of their own."""
        planned = self._planned(options)
        forms = self._forms(options, planned)
        own = [(unit.name, self._time(number, form)) for number, (unit, form) in enumerate(zip(self.units, forms, strict=True))]
        total = self.seconds_of(forms, planned)
        return [(name, seconds / total) for name, seconds in [*own, ("conversions", total - sum(seconds for _, seconds in own))]]

    def seconds(self, options: Sequence[Option]) -> float:
        """What a choice takes: one option for each group. NaN if a layer was not measured so."""
        planned = self._planned(options)
        return self.seconds_of(self._forms(options, planned), planned)

    def followers_in_float(self, options: Sequence[Option]) -> list[str]:
        """The layers without weights that a choice leaves in float, although they could run in integers."""
        return [unit.layer for unit, runs in zip(self.units, self._planned(options), strict=True) if unit.follows and not runs]

    def _planned(self, options: Sequence[Option]) -> list[bool]:
        planned = [options[unit.group].form == INTEGER if unit.group is not None else unit.integer for unit in self.units]
        self._settle(planned)
        return planned

    def _forms(self, options: Sequence[Option], planned: Sequence[bool]) -> list[str]:
        return [
            self.form(options[unit.group]) if unit.group is not None else INT8 if runs else FLOAT
            for unit, runs in zip(self.units, planned, strict=True)
        ]

    def seconds_of(self, forms: Sequence[str], planned: Sequence[bool]) -> float:
        """What units take in these forms, with the conversions between them.

        Args:
            forms: How each is computed.
            planned: Whether each reads, and makes, rounded tensors.
        """
        integer = [form == INT8 for form in forms]
        total = sum(self._time(number, form) for number, form in enumerate(forms))
        for tensor in self.tensors:
            readers = [number for number in tensor.readers if number is not None]
            rounded = any(planned[number] for number in readers) or (planned[tensor.maker] and not tensor.float_output)
            if not rounded:
                continue
            total += 0.0 if integer[tensor.maker] else tensor.entering
            in_float = any(number is None or not integer[number] for number in tensor.readers)
            packed = any(planned[number] and not integer[number] for number in readers)
            total += tensor.leaving if packed or (in_float and not tensor.at_readers) else 0.0
        return total

    def _settle(self, planned: list[bool]) -> None:
        """Followers run in integers where all that they read does, or something that reads them; where nothing says so, in float."""
        readers = self.readers()
        moved = True
        while moved:
            moved = False
            for number, unit in enumerate(self.units):
                if not unit.follows or planned[number]:
                    continue
                behind = bool(unit.sources) and all(source is not None and planned[source] for source in unit.sources)
                before = not unit.only_behind and any(planned[reader] for reader in readers[number])
                if behind or before:
                    planned[number] = moved = True

    def readers(self) -> list[list[int]]:
        """The units that read each unit's results."""
        found: list[list[int]] = [[] for _ in self.units]
        for tensor in self.tensors:
            found[tensor.maker] += [reader for reader in tensor.readers if reader is not None]
        return found

    def rows(self, columns: Mapping[int, Sequence[tuple[int, Option]]], first: int) -> SpeedRows:
        """The program's further columns and rows: who runs in integers, and which conversions that takes.

        Args:
            columns: By group the columns of its options.
            first: Number of the first free column.
        """
        return SpeedRows(self, columns, first)


class SpeedRows:
    """A speed's part of the integer program. Sums of columns are mappings of coefficients, and the number that is added to them.

    Attributes:
        rows: Its rows.
        seconds: Seconds by column.
        fixed: Seconds whatever is chosen.
        whole: For each of its columns whether it is whole (1) or follows by itself (0).
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
                self.seconds[self.follower[number]] = model._time(number, INT8) - model._time(number, FLOAT)
                self.fixed += model._time(number, FLOAT)
            else:
                self.fixed += model._time(number, INT8 if unit.integer else FLOAT)
        self.readers = model.readers()
        for number in self.follower:
            self._follow(number, self.readers[number])
        for tensor in model.tensors:
            self._convert(tensor)

    def loops(self, options: Sequence[Option], values: Sequence[float]) -> list[Row]:
        """What forbids followers of a solution that keep each other in integers with nothing else that does: they need support from outside.

        Such sets are rare, and there are as many as subsets, so they are forbidden when they come up.
        """
        planned = self.model._planned(options)
        held = {number for number, column in self.follower.items() if values[column] > 0.5 and not planned[number]}
        if not held:
            return []
        outside = [
            self._planned(reader) for n in held if not self.model.units[n].only_behind for reader in self.readers[n] if reader not in held
        ]
        outside += [self.behind[n] for n in held if not held.intersection(self.model.units[n].sources)]
        before = len(self.rows)
        for number in held:
            self._row([(1.0, self._planned(number)), *((-1.0, other) for other in outside)], 0.0)
        return self.rows[before:]

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
        """A follower runs in integers if all that it reads does, or one that reads it does."""
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
        for other in [behind, *after]:
            self._row([(1.0, other), (-1.0, own)], 0.0)
        self._row([(1.0, own), (-1.0, behind), *((-1.0, other) for other in after)], 0.0)

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
