"""How fast a choice is: the times of its layers, and of the conversions where layers in float and in integers meet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_cco.budget.layer_times import FLOAT, INT8, PACKED, WEIGHT_ONLY
from lightning_cco.budget.option import FLOAT as IN_FLOAT
from lightning_cco.budget.option import INTEGER, Option
from lightning_cco.errors import CCOError


@dataclass(frozen=True)
class FusedUnit:
    """What an engine computes at once: a layer with what is fused to it.

    Attributes:
        name: Its last layer.
        layer: Its first.
        group: Number of the group whose option says how it runs; `None`: it has no weights to choose for.
        follows: Whether it runs as its neighbours do; else, without a group, always the same way.
        integer: How it runs then: in integers, or in float.
        sources: Units whose results it reads, by number, that engines give as integers; `None` among them: a float that is never rounded.
        only_behind: Whether only what it reads counts, not what reads it (clamps).
        touching: Units of which one has to run in integers that what reads it counts; `None`: it counts in any case.
    """

    name: str
    layer: str = ""
    group: int | None = None
    follows: bool = False
    integer: bool = False
    sources: tuple[int | None, ...] = ()
    only_behind: bool = False
    touching: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Passed:
    """A tensor that may be converted on its way.

    Attributes:
        maker: The unit that makes it.
        readers: Those that read it; `None`: the model's output.
        float_output: Whether a product gives it in float without a conversion, so that only what reads it rounds it.
        at_readers: Whether it is rounded for its readers in integers alone, so that others read it as it was.
        entering: Seconds of a conversion to integers after its maker.
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

    units: list[FusedUnit]
    tensors: list[Passed]
    times: list[Mapping[str, float]]
    packed: bool = False
    float_seconds: float = field(init=False)

    def __post_init__(self) -> None:
        self.float_seconds = sum(self.time_of(number, FLOAT) for number in range(len(self.units)))

    def to_plain(self) -> dict[str, Any]:
        """Plain data, for the report page, which computes with it too."""
        units = [
            {
                "layer": unit.layer,
                "chosen": unit.group is not None,
                "follows": unit.follows,
                "integer": unit.integer,
                "sources": list(unit.sources),
                "only_behind": unit.only_behind,
                "touching": unit.touching,
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

    def time_of(self, unit: int, form: str) -> float:
        """Seconds of a unit; NaN: it was not measured in this form."""
        known = self.times[unit]
        own = self.units[unit].group is not None
        return known.get(form, math.nan if own else next(iter(known.values()), 0.0))

    def option_seconds(self, unit: int, option: Option) -> float:
        """What a unit takes with an option of its group.

        Raises:
            CCOError: The table has no time of it.
        """
        found = self.time_of(unit, self.form(option))
        if math.isnan(found):
            raise CCOError(
                f"budget_settings.layer_times: the table has no time of '{self.units[unit].name}' in the form '{self.form(option)}'; it has "
                f"{', '.join(self.times[unit])}. Measure again, by leaving layer_times out."
            )
        return found

    def group_seconds(self, group: int, option: Option) -> float:
        """What the layers of a group take with an option, conversions apart."""
        form = self.form(option)
        return sum(self.time_of(number, form) for number, unit in enumerate(self.units) if unit.group == group)

    def shares(self, options: Sequence[Option]) -> list[tuple[str, float]]:
        """The part of a choice's time that each layer takes; conversions under a name of their own."""
        planned = self.planned(options)
        forms = self._forms(options, planned)
        own = [(unit.name, self.time_of(number, form)) for number, (unit, form) in enumerate(zip(self.units, forms, strict=True))]
        total = self.seconds_of(forms, planned)
        return [(name, seconds / total) for name, seconds in [*own, ("conversions", total - sum(seconds for _, seconds in own))]]

    def seconds(self, options: Sequence[Option]) -> float:
        """What a choice takes: one option for each group. NaN if a layer was not measured so."""
        planned = self.planned(options)
        return self.seconds_of(self._forms(options, planned), planned)

    def followers_in_float(self, options: Sequence[Option]) -> list[str]:
        """The layers without weights that a choice leaves in float, although they could run in integers."""
        return [unit.layer for unit, runs in zip(self.units, self.planned(options), strict=True) if unit.follows and not runs]

    def planned(self, options: Sequence[Option]) -> list[bool]:
        """Whether each unit reads, and makes, rounded tensors."""
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
        total = sum(self.time_of(number, form) for number, form in enumerate(forms))
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
        """Followers run in integers where all that they read does, or something that reads them (and a part of what they read); else in float."""
        readers = self.readers()
        moved = True
        while moved:
            moved = False
            for number, unit in enumerate(self.units):
                if not unit.follows or planned[number]:
                    continue
                behind = bool(unit.sources) and all(source is not None and planned[source] for source in unit.sources)
                touches = unit.touching is None or any(planned[source] for source in unit.touching)
                before = touches and not unit.only_behind and any(planned[reader] for reader in readers[number])
                if behind or before:
                    planned[number] = moved = True

    def readers(self) -> list[list[int]]:
        """The units that read each unit's results."""
        found: list[list[int]] = [[] for _ in self.units]
        for tensor in self.tensors:
            found[tensor.maker] += [reader for reader in tensor.readers if reader is not None]
        return found
