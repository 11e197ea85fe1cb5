"""A budget's plan: the rules that it adds to a recipe, what is expected of it, and the trade-off that it was chosen from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_cco.budget.layer_times import LayerTimes
from lightning_cco.budget.option import FLOAT, INTEGER, WEIGHT_ONLY, Option
from lightning_cco.budget.options import UNIFORM, Choices
from lightning_cco.budget.solver import Choice, Limit, Measure, rise_of, solve, spread, taken_of, uniform
from lightning_cco.budget.speed import SpeedModel
from lightning_cco.errors import CCOError
from lightning_cco.figures import figure
from lightning_cco.names import list_names
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.settings import BudgetSettings, LayerRule, Settings, load_settings

_POINTS = 16
GOALS = ("size", "average_bits", "bops", "accuracy_drop", "speed")
"""The first that a recipe sets is the goal; a speed beside a size or an accuracy drop is a further limit."""
TITLES = {
    "size": "size of the file, as a part of that in float",
    "average_bits": "bits per weight, on average",
    "bops": "bit operations, as a part of those in float",
    "speed": "predicted speed, as a multiple of that in float",
}


@dataclass(frozen=True)
class Point:
    """One plan of the trade-off.

    Attributes:
        name: ``W8A8``, ``W4A8`` or ``W4A4`` for equal bits everywhere, ``chosen``, or empty.
        rise: Expected rise of the loss.
        size: Size of the file, relative to that of the float file.
        average_bits: Bits per weight, on average; 32 in float.
        bops: Bit operations, relative to those of the float model.
        speed: Predicted speed, as a multiple of the float model's; NaN where no times were measured.
    """

    name: str
    rise: float
    size: float
    average_bits: float
    bops: float
    speed: float = math.nan


@dataclass(frozen=True)
class LayerChoice:
    """What a budget has chosen for one layer.

    Attributes:
        layer: Its name.
        form: ``float``, ``weight-only`` or ``INT8``.
        weights: Bits of its weights.
        activations: Bits of what it reads, 32 where that is not rounded.
        bytes: What its group's weights take in the file.
        rise: Expected rise of the loss by its group's weights.
        reason: What fewer bits would save and cost, or why there was nothing to choose.
        seconds: What its group takes of one run, conversions apart; NaN where it was not measured.
    """

    layer: str
    form: str
    weights: int
    activations: int
    bytes: float
    rise: float
    reason: str
    seconds: float = math.nan


@dataclass
class BudgetPlan:
    """What a budget has chosen.

    Attributes:
        goal: Which goal was set.
        limit: Its value.
        layers: By layer.
        tensors: Bits of each rounded tensor, by its quantizer.
        rules: The rules that make a recipe this plan.
        chosen: Where the plan is on the trade-off.
        curve: The best plans at other limits.
        uniform: Those of equal bits everywhere.
        loss: What the sensitivities are of: ``loss`` or ``divergence``.
        size_bytes: Bytes of the file: as an export of this plan measured it, or, without one, as it is reckoned.
        float_bytes: Bytes of the file with nothing quantized, likewise.
        measured: Whether an export has measured it.
        metric: With ``accuracy_drop``: what each validated plan of the trade-off came to, by its size.
        speed_limit: The speed that it must have; `None`: any.
        seconds: What one run of it is predicted to take; NaN where no times were measured.
        float_seconds: What the float model takes, likewise.
        speed_curve: The best plans at other speeds.
        size_curve: The best plans at other sizes, where the curve is of speeds.
        by: By what the curve was gone through with ``accuracy_drop``: ``size`` or ``speed``.
        times: The table of layer times that this was predicted from.
        model: What any choice takes by it.
    """

    goal: str
    limit: float
    layers: list[LayerChoice]
    tensors: dict[str, int]
    rules: list[LayerRule]
    chosen: Point
    curve: list[Point]
    uniform: list[Point]
    loss: str = "loss"
    size_bytes: float = 0.0
    float_bytes: float = 0.0
    measured: bool = False
    metric: dict[str, float] = field(default_factory=dict)
    speed_limit: float | None = None
    seconds: float = math.nan
    float_seconds: float = math.nan
    speed_curve: list[Point] = field(default_factory=list)
    size_curve: list[Point] = field(default_factory=list)
    by: str = "size"
    times: LayerTimes | None = None
    model: SpeedModel | None = None

    def settings(self, base: Settings) -> Settings:
        """A recipe with this plan in it."""
        planned = load_settings(base)
        planned.layer_settings = [rule for rule in planned.layer_settings if rule.by != "budget"] + list(self.rules)
        planned.global_quantization_settings.skip_tail_quantization = False
        return planned

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for files and reports; the table of layer times is in a file of its own."""
        plain = asdict(replace(self, rules=[], times=None, model=None))
        return {key: value for key, value in plain.items() if key not in ("rules", "times", "model")}


def budget_rules(settings: Settings) -> list[LayerRule]:
    """The rules in a recipe that a budget has chosen."""
    return [rule for rule in settings.layer_settings if rule.by == "budget"]


def measures(made: Choices, overhead: float) -> dict[str, tuple[Measure, float, float]]:
    """For each goal what an option takes, what is taken anyway, and what 1 is; of a speed, its reciprocal is counted."""
    found: dict[str, tuple[Measure, float, float]] = {
        "size": (lambda option: option.bytes, made.fixed_bytes + overhead, max(1.0, made.float_bytes)),
        "average_bits": (lambda option: option.bits, 0.0, max(1.0, made.elements)),
        "bops": (lambda option: option.operations, 0.0, max(1.0, made.float_operations)),
    }
    if made.speed is not None:
        found["speed"] = made.speed, 0.0, max(1e-12, made.speed.float_seconds)
    return found


def limit_of(made: Choices, goal: str, limit: float, overhead: float = 0.0) -> Limit:
    """What a goal counts, and how much of it there is."""
    measure, fixed, unit = measures(made, overhead)[goal]
    return measure, (unit / limit if goal == "speed" else limit * unit) - fixed


def as_planned(made: Choices, plan: QuantizationPlan) -> Choice:
    """The options that a plan has taken, or those nearest to them; for sizes, so without tensors."""
    chosen = []
    for group in made.groups:
        decision = plan.decisions[group.layers[0]]
        form = INTEGER if decision.quantized else WEIGHT_ONLY if decision.weight_only else FLOAT
        distance = [
            (option.form != form, abs(option.weights - (decision.weights_num_bits or 32)), i) for i, option in enumerate(group.options)
        ]
        chosen.append(group.options[min(distance)[-1]])
    return Choice(tuple(chosen), {})


def smallest(made: Choices) -> Choice:
    """The choice whose weights take the fewest bytes."""
    found = solve(made, lambda option: option.bytes, None)
    assert found is not None
    return found


def choose(made: Choices, goal: str, limit: float, overhead: float, also: Sequence[Limit] = ()) -> Choice:
    """The best choice within a limit, and within others.

    Raises:
        CCOError: Nothing is.
    """
    measure, most = limit_of(made, goal, limit, overhead)
    found = solve(made, measure, most, also)
    if found is None:
        raise CCOError(_out_of_reach(made, goal, limit, overhead, also))
    return found


def _out_of_reach(made: Choices, goal: str, limit: float, overhead: float, also: Sequence[Limit]) -> str:
    """What is said of a limit within which there is nothing."""
    measure, fixed, unit = measures(made, overhead)[goal]
    if also and solve(made, measure, limit_of(made, goal, limit, overhead)[1]) is not None:
        fast = point_of(made, solve(made, *also[0]) or fastest(made), overhead)
        return (
            f"budget_settings: {goal}: {limit:g} and the speed can't be reached together: of what is as fast, the least {goal} is above it; what loses "
            f"least at that speed has {goal} {figure(getattr(fast, goal), 3)} and speed {figure(fast.speed, 3)}. Allow more of one of them."
        )
    if goal == "speed":
        return too_slow(made, limit)
    least = solve(made, measure, None)
    assert least is not None
    smallest = (taken_of(least, measure) + fixed) / unit
    packed = any(option.form != FLOAT and option.weights <= 4 for group in made.groups for option in group.options)
    more = "" if packed or goal != "size" else " With deployment_settings.int4: true weights of at most 4 bits take half a byte."
    if goal == "size":
        more += (
            f" {fixed:,.0f} of the {taken_of(least, measure) + fixed:,.0f} bytes are no weights (but operators, names, the recipe in the file, biases): what "
            "small networks save is little beside them."
        )
    return (
        f"budget_settings.{goal}: {limit:g} can't be reached: the least is {smallest:.4g}, with the layers that the recipe's rules leave to choose. "
        f"Write at least {_rounded_up(smallest)}, or take rules back.{more}{_kept(made)}"
    )


def _kept(made: Choices) -> str:
    kept = [(name, group.why) for group in made.groups for name in group.layers if group.why]
    return f" Not to choose: {list_names([f'{name} ({why})' for name, why in kept])}." if kept else ""


def too_slow(made: Choices, limit: float) -> str:
    """What is said of a speed that no choice has: the largest, where its time goes, and what would help."""
    model = made.speed
    assert model is not None
    best = fastest(made)
    seconds, whole = model.seconds(best.options), model.float_seconds
    everything = model.seconds(uniform(made, "W8A8", 8).options)
    shares = sorted(((share, name) for name, share in model.shares(best.options)), reverse=True)[:3]
    where = ", ".join(f"{name or 'the rest'} {100 * share:.0f} %" for share, name in shares)
    count = sum(option.form == INTEGER for option in best.options)
    return (
        f"budget_settings.speed: {limit:g} can't be reached: the largest is {figure(whole / seconds, 3)}, {figure(1e3 * seconds)} ms instead of "
        f"{figure(1e3 * whole)} in float, with {count} of {len(best.options)} groups of layers in INT8 (the recipe's usual choice, INT8 but for the tail: "
        f"{figure(whole / everything, 3)}). Most of that time goes to {where}. Write at most {figure(0.99 * whole / seconds, 3)}; for more, use a "
        "processor whose products in INT8 are faster (x86 with VNNI: Intel since 2019, AMD since Zen 4; ARM with dot products), and give what was measured "
        f"there as layer_times; or make layers wider.{_kept(made)}"
    )


def fastest(made: Choices) -> Choice:
    """The choice that takes least time."""
    assert made.speed is not None
    found = solve(made, made.speed, None)
    assert found is not None
    return found


def _rounded_up(value: float) -> str:
    return figure(value * 1.01 + 1e-12, 3)


def point_of(made: Choices, choice: Choice, overhead: float, name: str = "") -> Point:
    """Where a choice is on the trade-off."""
    by_goal = {goal: (taken_of(choice, measure) + fixed) / unit for goal, (measure, fixed, unit) in measures(made, overhead).items()}
    speed = 1 / by_goal["speed"] if by_goal.get("speed") else math.nan
    return Point(name, rise_of(made, choice), by_goal["size"], by_goal["average_bits"], by_goal["bops"], speed)


def trade_off(made: Choices, goal: str, overhead: float, count: int = _POINTS, also: Sequence[Limit] = ()) -> list[tuple[Choice, Point]]:
    """The best choices from the one that takes least to the one that loses least, fewest first; within further limits."""
    measure, fixed, _ = measures(made, overhead)[goal]
    least, best = solve(made, measure, None, also), solve(made, measure, 1e300, also)
    if least is None or best is None:
        return []
    found: dict[float, tuple[Choice, Point]] = {}
    for limit in spread(taken_of(least, measure) + fixed, taken_of(best, measure) + fixed, count):
        choice = solve(made, measure, (limit - fixed) * (1 + 1e-9), also)
        if choice is not None:
            found[taken_of(choice, measure)] = choice, point_of(made, choice, overhead)
    return [found[taken] for taken in sorted(found)]


def uniform_points(made: Choices, overhead: float) -> list[Point]:
    """The plans of equal bits everywhere."""
    return [point_of(made, uniform(made, name, bits[1]), overhead, name) for name, bits in UNIFORM.items()]


def rules_of(made: Choices, choice: Choice, tail: list[LayerRule], tensors_bits: Mapping[str, int]) -> list[LayerRule]:
    """The rules that make a plan of a choice."""
    rules = list(tail)
    if made.speed is not None:  # layers without weights that read each other would keep each other in integers
        known = {rule.match for rule in tail}
        rules += [
            LayerRule(skip_quantization=True, match=name, by="budget")
            for name in made.speed.followers_in_float(choice.options)
            if name not in known
        ]
    bits_of = {str(key.layer): bits for key, bits in choice.tensors.items()}
    for group, option in zip(made.groups, choice.options, strict=True):
        for name in group.layers:
            rules.append(
                LayerRule(
                    skip_quantization=True if option.form == FLOAT else None,
                    weights_num_bits=None if option.form == FLOAT else option.weights,
                    weight_only=True if option.form == WEIGHT_ONLY else None,
                    match=name,
                    by="budget",
                )
            )
    rules += [
        LayerRule(activations_num_bits=bits, match=name, by="budget") for name, bits in bits_of.items() if tensors_bits.get(name) != bits
    ]
    return rules


def layer_choices(made: Choices, choice: Choice, goal: str) -> list[LayerChoice]:
    """What was chosen for each layer, with what fewer bits, or another form, would save and cost."""
    found = []
    unit = {"size": "bytes", "average_bits": "bits", "bops": "bit operations", "speed": "µs"}[goal]
    for number, (group, option) in enumerate(zip(made.groups, choice.options, strict=True)):
        taken = [_taken_with(made, choice, goal, number, other) for other in group.options]
        reason = group.why or _reason(group.options, option, taken, unit)
        seconds = math.nan if made.speed is None else made.speed.group_seconds(number, option)
        for name in group.layers:
            shared = f"; with {', '.join(other for other in group.layers if other != name)}" if len(group.layers) > 1 else ""
            found.append(
                LayerChoice(name, option.form, option.weights, option.activations, option.bytes, option.rise, reason + shared, seconds)
            )
    return found


def _taken_with(made: Choices, choice: Choice, goal: str, number: int, option: Option) -> float:
    """What is taken if one group had another option: of time in µs, conversions included, as the others are."""
    measure = measures(made, 0.0)[goal][0]
    if not isinstance(measure, SpeedModel):
        return measure(option)
    options = list(choice.options)
    options[number] = option
    return 1e6 * measure.seconds(options)


def _reason(options: tuple[Option, ...], chosen: Option, taken: Sequence[float], unit: str) -> str:
    said = []
    now = taken[options.index(chosen)]
    smaller = [(cost, place) for place, cost in enumerate(taken) if cost < now]
    larger = [(cost, place) for place, cost in enumerate(taken) if cost > now]
    if smaller:
        cost, place = max(smaller)
        other = options[place]
        said.append(f"{_words(other)} would save {figure(now - cost)} {unit} for {other.rise - chosen.rise:+.2g} of the loss")
    if larger:
        cost, place = min(larger)
        other = options[place]
        said.append(f"{_words(other)} would cost {figure(cost - now)} {unit} for {other.rise - chosen.rise:+.2g} of the loss")
    return ", ".join(said) or "the only way that is possible"


def _words(option: Option) -> str:
    if option.form == FLOAT:
        return "float"
    bits = f"{option.weights} bits"
    return f"{bits} (weights alone)" if option.form == WEIGHT_ONLY else bits


def goal_of(settings: BudgetSettings) -> tuple[str, float] | None:
    """The goal that a recipe sets; `None` if it sets none."""
    return next(((goal, float(value)) for goal in GOALS if (value := getattr(settings, goal)) is not None), None)
