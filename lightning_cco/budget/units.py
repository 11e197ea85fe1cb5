"""From a plan and a table of times to what any other plan of the same model takes; and from measured files to the table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from lightning_cco.budget.layer_times import FLOAT, INT8, PACKED, WEIGHT_ONLY, LayerTimes
from lightning_cco.budget.options import Choices
from lightning_cco.budget.speed import FusedUnit, Passed, SpeedModel
from lightning_cco.errors import CCOError
from lightning_cco.graph.ops import Category
from lightning_cco.names import list_names
from lightning_cco.quantization.connections import Connections
from lightning_cco.quantization.int8_conditions import reads_one
from lightning_cco.quantization.plan import QuantizationPlan, packs_weights
from lightning_cco.quantization.targets import TARGETS, Target

REST = ""
"""In a table what belongs to no layer."""
_LEAST, _MOST = 0.3, 3.0
"""How much the conversions of mixed files may be scaled to what these files take in all."""


class Times(Protocol):
    """What a measured file takes, in seconds: see `lightning_cco.export.node_times.FileTimes`."""

    total: float
    layers: dict[str, float]
    entering: dict[str, float]
    leaving: dict[str, float]


@dataclass(frozen=True)
class Probe:
    """A measured file.

    Attributes:
        name: Its name.
        plan: The plan that it was exported of.
        times: What it takes.
    """

    name: str
    plan: QuantizationPlan
    times: Times


def speed_model(made: Choices, base: QuantizationPlan, table: LayerTimes) -> SpeedModel:
    """What any choice takes by a table.

    Args:
        made: What can be chosen.
        base: The plan with everything quantized that can be.
        table: The times.

    Raises:
        CCOError: The table is of another model.
    """
    units, tensors = _units(made, base)
    table.check(unit.name for unit in units if unit.group is not None)
    known = [Passed(t.maker, t.readers, t.float_output, t.at_readers, *_conversions(table, units[t.maker].name)) for t in tensors]
    times: list[Mapping[str, float]] = [table.layers.get(unit.name, {}) for unit in units]
    return SpeedModel(units, known, times, packs_weights(base.settings))


def timed(made: Choices) -> Choices:
    """What can be chosen of what the table has times of: one that was measured elsewhere may not have every form.

    Raises:
        CCOError: Of a layer that must be chosen for it has no time in any form that it may have.
    """
    model = made.speed
    assert model is not None
    groups = []
    for number, group in enumerate(made.groups):
        known = tuple(option for option in group.options if not math.isnan(model.group_seconds(number, option)))
        if not known:
            wanted = ", ".join(dict.fromkeys(model.form(option) for option in group.options))
            raise CCOError(
                f"budget_settings.layer_times: the table has no time of {list_names(list(group.layers))} in the forms that the recipe leaves to choose: "
                f"{wanted}. Measure again, by leaving layer_times out."
            )
        groups.append(replace(group, options=known))
    return replace(made, groups=groups)


def seconds_of_plan(model: SpeedModel, plan: QuantizationPlan) -> float:
    """What a plan takes, by how it runs each layer."""
    planned = [unit.layer in plan.quantized if unit.group is not None or unit.follows else unit.integer for unit in model.units]
    return model.seconds_of(forms_of(model.units, plan), planned)


def forms_of(units: Sequence[FusedUnit], plan: QuantizationPlan) -> list[str]:
    """How a plan runs each unit."""
    packs = packs_weights(plan.settings)

    def form(unit: FusedUnit) -> str:
        decision = plan.decisions.get(unit.layer)
        if unit.group is None and not unit.follows:
            return INT8 if unit.integer else FLOAT
        if decision is None or not (decision.quantized or decision.weight_only):
            return FLOAT
        if packs and (decision.weights_num_bits or 8) <= 4:
            return PACKED
        return INT8 if decision.quantized else WEIGHT_ONLY

    return [form(unit) for unit in units]


def layer_times(
    made: Choices, base: QuantizationPlan, probes: Sequence[Probe], engine: str, processor: str, threads: int, inputs: list[list[int]]
) -> LayerTimes:
    """The table that measured files give.

    A layer's time in some form is that in the first file in which it has this form; so the files of one form everywhere come first. What conversions take
    is scaled so that the files which mix forms take what they were measured to take.

    Args:
        made: What can be chosen.
        base: The plan with everything quantized that can be.
        probes: The files.
        engine: What measured them.
        processor: On what.
        threads: With how many threads.
        inputs: On inputs of which shapes.
    """
    units, tensors = _units(made, base)
    unit_of = _unit_of(base)
    layers: dict[str, dict[str, float]] = {unit.name: {} for unit in units}
    conversions: dict[str, dict[str, list[float]]] = {"entering": {}, "leaving": {}}
    for probe in probes:
        taken = _by_unit(probe.times.layers, unit_of)
        for unit, form in zip(units, forms_of(units, probe.plan), strict=True):
            layers[unit.name].setdefault(form, taken.get(unit.name, 0.0))
        for kind, found in conversions.items():
            for name, seconds in _by_unit(getattr(probe.times, kind), unit_of).items():
                if seconds > 0:
                    found.setdefault(name, []).append(seconds)
    makers = {units[tensor.maker].name for tensor in tensors}
    sizes = {name: _elements(base, name) for name in makers}
    entering, leaving = (
        _completed({n: float(np.mean(values)) for n, values in found.items() if n in makers}, sizes) for found in conversions.values()
    )
    files = {probe.name: probe.times.total for probe in probes}
    table = LayerTimes(engine, processor, threads, inputs, layers, entering, leaving, files)
    scale = _scale(speed_model(made, base, table), probes)
    return LayerTimes(engine, processor, threads, inputs, layers, _scaled(entering, scale), _scaled(leaving, scale), files)


def _scale(model: SpeedModel, probes: Sequence[Probe]) -> float:
    """What the conversions of mixed files take in all, over the sum of what each was measured to take."""
    left = counted = 0.0
    for probe in probes:
        forms = forms_of(model.units, probe.plan)
        own = sum(times.get(form, 0.0) for times, form in zip(model.times, forms, strict=True))
        counted += (between := seconds_of_plan(model, probe.plan) - own)
        left += probe.times.total - own if between > 0 else 0.0
    return min(_MOST, max(_LEAST, left / counted)) if counted > 0 else 1.0


def _scaled(found: Mapping[str, float], scale: float) -> dict[str, float]:
    return {name: seconds * scale for name, seconds in found.items()}


def _conversions(table: LayerTimes, name: str) -> tuple[float, float]:
    return table.entering.get(name, 0.0), table.leaving.get(name, 0.0)


def _by_unit(found: Mapping[str, float], unit_of: Mapping[str, str]) -> dict[str, float]:
    summed: dict[str, float] = {}
    for name, seconds in found.items():
        unit = unit_of.get(name, REST)
        summed[unit] = summed.get(unit, 0.0) + seconds
    return summed


def _completed(found: dict[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Conversions that were not measured, from those that were: a constant, and something for each value."""
    known = [(sizes[name], seconds) for name, seconds in found.items()]
    if not known:
        return {}
    xs, ys = np.array([x for x, _ in known], float), np.array([y for _, y in known], float)
    slope, constant = np.polyfit(xs, ys, 1) if len(set(xs)) > 1 else (0.0, float(ys.mean()))
    if slope < 0 or constant < 0:
        slope, constant = float(ys.sum() / max(1.0, xs.sum())), 0.0
    return {name: found.get(name, float(constant + slope * size)) for name, size in sizes.items()}


def _elements(base: QuantizationPlan, name: str) -> int:
    return sum(int(np.prod(shape)) for shape in base.graph[name].output_shapes) if name else 0


def _unit_of(base: QuantizationPlan) -> dict[str, str]:
    """The last layer of each layer's group."""
    return {name: base.end_of_group(name) for name in base.graph.names}


def _touching(
    base: QuantizationPlan, target: Target, sources: Sequence[str], reader: str, firsts: Mapping[str, tuple[int, str]]
) -> tuple[int, ...] | None:
    """The units of which one has to give integers to a sum or a product that a reader is to make one of integers; `None`: none has to.

    Args:
        base: The plan, with the layers.
        target: The engine.
        sources: What the sum or product reads.
        reader: The sum or product.
        firsts: Of each layer the number of its unit, and the unit's first layer.
    """
    graph = base.graph
    if reads_one(graph[reader]) or any(graph[name].kind == "input" for name in sources):
        return None
    found = []
    for name in sources:
        number, first = firsts[name]
        if target.gives_int8(graph[first if name in base.folded else name].kind):
            found.append(number)
    return tuple(found)


def _units(made: Choices, base: QuantizationPlan) -> tuple[list[FusedUnit], list[Passed]]:
    """What is computed at once, and what passes between, without times."""
    graph, connections, unit_of = base.graph, Connections(base.graph), _unit_of(base)
    target = TARGETS[base.settings.deployment_settings.target_framework]
    group_of = {name: number for number, group in enumerate(made.groups) for name in group.layers}
    members: dict[str, list[str]] = {}
    for layer in graph:
        if layer.kind != "output":
            members.setdefault(unit_of[layer.name], []).append(layer.name)
    place = {end: number for number, end in enumerate(members)}
    firsts = {name: (place[end], names[0]) for end, names in members.items() for name in names}
    units = []
    for end, names in members.items():
        first = next((name for name in names if name in group_of), names[0])
        group = group_of.get(first)
        kind, category = graph[first].kind, connections.category[first]
        only_behind = category is Category.CLAMP or kind == "batch_norm"
        runs = first in base.quantized and group is None and not connections.passes(first) and kind != "input"
        follows = runs and first not in base.forced and (kind in target.elementwise_kinds or only_behind)
        loose = target.float_outputs | (frozenset() if category is Category.CLAMP else target.followed_in_float)
        sources = tuple(
            place[unit_of[key.layer]] if graph[base.computed_with(key.layer)].kind not in loose | {"input"} else None
            for key in connections.sources(first)
        )
        touching = (
            _touching(base, target, [key.layer for key in connections.sources(first)], first, firsts)
            if follows and not only_behind
            else None
        )
        units.append(FusedUnit(end, first, group, follows, runs and not follows, sources if follows else (), only_behind, touching))
    tensors = []
    for end, number in place.items():
        keys = [key for key in connections.outputs(end, at_least=1) if key in base.tensors]
        if not keys or connections.passes(end):
            continue
        readers = dict.fromkeys(
            None if graph[name].kind == "output" else place[unit_of[name]] for name in connections.consumers(end) if unit_of[name] != end
        )
        tensors.append(
            Passed(number, tuple(readers), graph[end].kind in target.float_outputs, any(key in base.at_readers for key in keys), 0.0, 0.0)
        )
    return [*units, FusedUnit(REST, REST)], tensors
