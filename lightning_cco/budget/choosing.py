"""The best choices: within a limit, along the whole trade-off, and those of equal bits to compare with."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_cco.budget.integer_program import Choice
from lightning_cco.budget.limits import limit_of, measures, point_of
from lightning_cco.budget.options import UNIFORM, Choices
from lightning_cco.budget.plan import Point
from lightning_cco.budget.refusals import out_of_reach
from lightning_cco.budget.solver import Limit, solve, spread, taken_of, uniform
from lightning_cco.errors import CCOError

_POINTS = 16


def choose(made: Choices, goal: str, limit: float, overhead: float, also: Sequence[Limit] = ()) -> Choice:
    """The best choice within a limit, and within others.

    Raises:
        CCOError: Nothing is.
    """
    measure, most = limit_of(made, goal, limit, overhead)
    found = solve(made, measure, most, also)
    if found is None:
        raise CCOError(out_of_reach(made, goal, limit, overhead, also))
    return found


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
