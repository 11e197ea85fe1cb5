"""What a goal counts: how much each choice takes of it, and where that is on the trade-off."""

from __future__ import annotations

import math

from lightning_cco.budget.integer_program import Choice
from lightning_cco.budget.options import Choices
from lightning_cco.budget.plan import Point
from lightning_cco.budget.solver import Limit, Measure, rise_of, solve, taken_of


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


def point_of(made: Choices, choice: Choice, overhead: float, name: str = "") -> Point:
    """Where a choice is on the trade-off."""
    by_goal = {goal: (taken_of(choice, measure) + fixed) / unit for goal, (measure, fixed, unit) in measures(made, overhead).items()}
    speed = 1 / by_goal["speed"] if by_goal.get("speed") else math.nan
    return Point(name, rise_of(made, choice), by_goal["size"], by_goal["average_bits"], by_goal["bops"], speed)


def smallest(made: Choices) -> Choice:
    """The choice whose weights take the fewest bytes."""
    found = solve(made, lambda option: option.bytes, None)
    assert found is not None
    return found


def fastest(made: Choices) -> Choice:
    """The choice that takes least time."""
    assert made.speed is not None
    found = solve(made, made.speed, None)
    assert found is not None
    return found
