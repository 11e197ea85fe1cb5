"""A budget's plan: the rules that it adds to a recipe, what is expected of it, and the trade-off that it was chosen from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_cco.budget.options import FLOAT, INTEGER, UNIFORM, WEIGHT_ONLY, Choices, Option
from lightning_cco.budget.solver import Choice, Measure, rise_of, solve, spread, taken_of, uniform
from lightning_cco.errors import CCOError
from lightning_cco.figures import figure
from lightning_cco.names import list_names
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.settings import BudgetSettings, LayerRule, Settings, load_settings

_POINTS = 16
GOALS = ("size", "average_bits", "bops", "accuracy_drop")
TITLES = {
    "size": "size of the file, as a part of that in float",
    "average_bits": "bits per weight, on average",
    "bops": "bit operations, as a part of those in float",
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
    """

    name: str
    rise: float
    size: float
    average_bits: float
    bops: float


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
    """

    layer: str
    form: str
    weights: int
    activations: int
    bytes: float
    rise: float
    reason: str


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

    def settings(self, base: Settings) -> Settings:
        """A recipe with this plan in it."""
        planned = load_settings(base)
        planned.layer_settings = [rule for rule in planned.layer_settings if rule.by != "budget"] + list(self.rules)
        planned.global_quantization_settings.skip_tail_quantization = False
        return planned

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for files and reports."""
        plain = asdict(replace(self, rules=[]))
        plain.pop("rules")
        return plain


def budget_rules(settings: Settings) -> list[LayerRule]:
    """The rules in a recipe that a budget has chosen."""
    return [rule for rule in settings.layer_settings if rule.by == "budget"]


def measures(made: Choices, overhead: float) -> dict[str, tuple[Measure, float, float]]:
    """For each goal what an option takes, what is taken anyway, and what 1 is."""
    return {
        "size": (lambda option: option.bytes, made.fixed_bytes + overhead, max(1.0, made.float_bytes)),
        "average_bits": (lambda option: option.bits, 0.0, max(1.0, made.elements)),
        "bops": (lambda option: option.operations, 0.0, max(1.0, made.float_operations)),
    }


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


def choose(made: Choices, goal: str, limit: float, overhead: float) -> Choice:
    """The best choice within a limit.

    Raises:
        CCOError: Nothing is.
    """
    measure, fixed, unit = measures(made, overhead)[goal]
    found = solve(made, measure, limit * unit - fixed)
    if found is None:
        least = solve(made, measure, None)
        assert least is not None
        smallest = (taken_of(least, measure) + fixed) / unit
        packed = any(option.form != FLOAT and option.weights <= 4 for group in made.groups for option in group.options)
        more = "" if packed or goal != "size" else " With deployment_settings.int4: true weights of at most 4 bits take half a byte."
        if goal == "size":
            more += f" {fixed:,.0f} of the {taken_of(least, measure) + fixed:,.0f} bytes are no weights: what small networks save is little beside them."
        kept = [(name, group.why) for group in made.groups for name in group.layers if group.why]
        if kept:
            more += f" Not to choose: {list_names([f'{name} ({why})' for name, why in kept])}."
        raise CCOError(
            f"budget_settings.{goal}: {limit:g} can't be reached: the least is {smallest:.4g}, with the layers that the recipe's rules leave to choose. "
            f"Write at least {_rounded_up(smallest)}, or take rules back.{more}"
        )
    return found


def _rounded_up(value: float) -> str:
    return figure(value * 1.01 + 1e-12, 3)


def point_of(made: Choices, choice: Choice, overhead: float, name: str = "") -> Point:
    """Where a choice is on the trade-off."""
    by_goal = {goal: (taken_of(choice, measure) + fixed) / unit for goal, (measure, fixed, unit) in measures(made, overhead).items()}
    return Point(name, rise_of(made, choice), by_goal["size"], by_goal["average_bits"], by_goal["bops"])


def trade_off(made: Choices, goal: str, overhead: float, count: int = _POINTS) -> list[tuple[Choice, Point]]:
    """The best choices from the one that takes least to the one that loses least, fewest first."""
    measure, fixed, _ = measures(made, overhead)[goal]
    least, best = solve(made, measure, None), solve(made, measure, 1e300)
    assert least is not None
    assert best is not None
    found: dict[float, tuple[Choice, Point]] = {}
    for limit in spread(taken_of(least, measure) + fixed, taken_of(best, measure) + fixed, count):
        choice = solve(made, measure, (limit - fixed) * (1 + 1e-9))
        if choice is not None:
            found[taken_of(choice, measure)] = choice, point_of(made, choice, overhead)
    return [found[taken] for taken in sorted(found)]


def uniform_points(made: Choices, overhead: float) -> list[Point]:
    """The plans of equal bits everywhere."""
    return [point_of(made, uniform(made, name, bits[1]), overhead, name) for name, bits in UNIFORM.items()]


def rules_of(made: Choices, choice: Choice, tail: list[LayerRule], tensors_bits: Mapping[str, int]) -> list[LayerRule]:
    """The rules that make a plan of a choice."""
    rules = list(tail)
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
    """What was chosen for each layer, with what fewer bits would save and cost."""
    measure = measures(made, 0.0)[goal][0]
    unit = {"size": "bytes", "average_bits": "bits", "bops": "bit operations"}[goal]
    found = []
    for group, option in zip(made.groups, choice.options, strict=True):
        reason = group.why or _reason(group.options, option, measure, unit)
        for name in group.layers:
            shared = f"; with {', '.join(other for other in group.layers if other != name)}" if len(group.layers) > 1 else ""
            found.append(LayerChoice(name, option.form, option.weights, option.activations, option.bytes, option.rise, reason + shared))
    return found


def _reason(options: tuple[Option, ...], chosen: Option, measure: Measure, unit: str) -> str:
    said = []
    smaller = [other for other in options if measure(other) < measure(chosen)]
    larger = [other for other in options if measure(other) > measure(chosen)]
    if smaller:
        other = max(smaller, key=measure)
        said.append(
            f"{_words(other)} would save {figure(measure(chosen) - measure(other))} {unit} for {other.rise - chosen.rise:+.2g} of the loss"
        )
    if larger:
        other = min(larger, key=measure)
        said.append(
            f"{_words(other)} would cost {figure(measure(other) - measure(chosen))} {unit} for {other.rise - chosen.rise:+.2g} of the loss"
        )
    return ", ".join(said) or "the only way that is possible"


def _words(option: Option) -> str:
    if option.form == FLOAT:
        return "float"
    bits = f"{option.weights} bits"
    return f"{bits} (weights alone)" if option.form == WEIGHT_ONLY else bits


def goal_of(settings: BudgetSettings) -> tuple[str, float] | None:
    """The goal that a recipe sets; `None` if it sets none."""
    return next(((goal, float(value)) for goal in GOALS if (value := getattr(settings, goal)) is not None), None)
