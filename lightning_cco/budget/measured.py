"""The table of layer times, measured: the model is exported in several ways, and all files are run in turns."""

from __future__ import annotations

from typing import Protocol

from lightning_cco.budget.integer_program import Choice
from lightning_cco.budget.layer_times import LayerTimes, from_plain, processor_name
from lightning_cco.budget.option import FLOAT, INTEGER, WEIGHT_ONLY, Option
from lightning_cco.budget.options import Choices
from lightning_cco.budget.planned_model import PlannedModel
from lightning_cco.budget.units import Probe, Times, layer_times
from lightning_cco.errors import CCOError
from lightning_cco.quantization.plan import QuantizationPlan, packs_weights


class LayerTimer(Protocol):
    """Exports the model as it is planned, several times, and measures all of the files in turns.

    Attributes:
        engine: Name and version of what it measures in.
        threads: Threads of it.
        inputs: Shapes of the inputs, once it has measured.
    """

    engine: str
    threads: int
    inputs: list[list[int]]

    def export(self, name: str) -> None:
        """Write the model as it is planned now."""
        ...

    def times(self) -> dict[str, Times]:
        """Measure what was written, by name."""
        ...


def measured_times(model: PlannedModel, timer: LayerTimer, made: Choices, base: QuantizationPlan) -> LayerTimes:
    """The table of layer times: the model exported in float, in integers, mixed in both ways, and in 4 bits where these are stored so.

    Raises:
        CCOError: A file can't be written or run.
    """
    wanted = {"float": model.recipe_of(made, base, None)}
    for name, options in probes(made, packs_weights(model.settings)).items():
        wanted[name] = model.recipe_of(made, base, Choice(options, {}))
    plans, problem = {}, ""
    for name, planned in wanted.items():
        model.replan(planned)
        plans[name] = model.quantized.plan
        if problem:
            continue  # the other processes replan as often
        try:
            timer.export(name)
        except CCOError as error:
            problem = str(error)
    model.replan(base.settings)
    table = None
    if not problem:
        try:
            taken = timer.times()
            found = [Probe(name, plans[name], taken[name]) for name in wanted if name in taken]
            if found:
                table = layer_times(made, base, found, timer.engine, processor_name(), timer.threads, timer.inputs)
        except CCOError as error:
            problem = str(error)
    problem, plain = model.agree((problem, None if table is None else table.to_plain()))
    if problem:
        raise CCOError(f"budget_settings.speed: the files whose times were to be measured could not be written or run: {problem}")
    return from_plain(plain)


def probes(made: Choices, packed: bool) -> dict[str, tuple[Option, ...]]:
    """Options for each group in the files that are measured in addition to the float one: all in integers, every other one, the others, and all in 4 bits.

    What can have its weights alone in integers has that in the place of float in the mixed files.
    """
    found: dict[str, list[Option]] = {"INT8": [], "every other layer": [], "the others": []}
    narrow: list[Option] = []
    for number, group in enumerate(made.groups):
        wide = [option for option in group.options if not packed or option.weights > 4] or list(group.options)
        by_form = {option.form: option for option in reversed(wide)}
        whole = by_form.get(INTEGER) or by_form.get(WEIGHT_ONLY) or wide[0]
        left = by_form.get(WEIGHT_ONLY) or by_form.get(FLOAT) or whole
        found["INT8"].append(whole)
        found["every other layer"].append(left if number % 2 else whole)
        found["the others"].append(whole if number % 2 else left)
        narrow.append(next((option for option in group.options if packed and option.weights <= 4), whole))
    distinct: dict[tuple[Option, ...], str] = {}
    for name, options in [*found.items(), ("4 bits", narrow)]:
        distinct.setdefault(tuple(options), name)
    return {name: options for options, name in distinct.items()}
