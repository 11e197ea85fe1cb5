"""A choice as rules of a recipe, and a plan as a choice: with the reason of each layer's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_cco.budget.integer_program import Choice
from lightning_cco.budget.limits import measures
from lightning_cco.budget.option import FLOAT, INTEGER, WEIGHT_ONLY, Option
from lightning_cco.budget.options import Choices
from lightning_cco.budget.plan import LayerChoice
from lightning_cco.budget.speed import SpeedModel
from lightning_cco.number_format import figure
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.settings import LayerRule


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
    return ", ".join(said) or "the only choice that is possible"


def _words(option: Option) -> str:
    if option.form == FLOAT:
        return "float"
    bits = f"{option.weights} bits"
    return f"{bits} (weights alone)" if option.form == WEIGHT_ONLY else bits
