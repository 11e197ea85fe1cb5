"""What is said of a budget that no choice is within: what the least is, where it goes, and what to write instead."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_cco.budget.limits import fastest, limit_of, measures, point_of
from lightning_cco.budget.option import FLOAT, INTEGER
from lightning_cco.budget.options import Choices
from lightning_cco.budget.solver import Limit, solve, taken_of, uniform
from lightning_cco.names import list_names
from lightning_cco.number_format import figure


def out_of_reach(made: Choices, goal: str, limit: float, overhead: float, also: Sequence[Limit]) -> str:
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


def too_slow(made: Choices, limit: float) -> str:
    """What is said of a speed that no choice has: the largest, where its time goes, and what would help."""
    model = made.speed
    assert model is not None
    best = fastest(made)
    seconds, whole = model.seconds(best.options), model.float_seconds
    everything = model.seconds(uniform(made, "W8A8", 8).options)
    usual = f" (the recipe's usual choice, INT8 but for the tail: {figure(whole / everything, 3)})" if math.isfinite(everything) else ""
    shares = sorted(((share, name) for name, share in model.shares(best.options)), reverse=True)[:3]
    where = ", ".join(f"{name or 'the rest'} {100 * share:.0f} %" for share, name in shares)
    count = sum(option.form == INTEGER for option in best.options)
    return (
        f"budget_settings.speed: {limit:g} can't be reached: the largest is {figure(whole / seconds, 3)}, {figure(1e3 * seconds)} ms instead of "
        f"{figure(1e3 * whole)} in float, with {count} of {len(best.options)} groups of layers in INT8{usual}. "
        f"Most of that time goes to {where}. Write at most {figure(0.99 * whole / seconds, 3)}; for more, use a "
        "processor whose products in INT8 are faster (x86 with VNNI: Intel since 2019, AMD since Zen 4; ARM with dot products), and give what was measured "
        f"there as layer_times; or make layers wider.{_kept(made)}"
    )


def _kept(made: Choices) -> str:
    kept = [(name, group.why) for group in made.groups for name in group.layers if group.why]
    return f" Not to choose: {list_names([f'{name} ({why})' for name, why in kept])}." if kept else ""


def _rounded_up(value: float) -> str:
    return figure(value * 1.01 + 1e-12, 3)
