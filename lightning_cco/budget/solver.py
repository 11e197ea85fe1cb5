"""The choice itself: the least expected rise of the loss within limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lightning_cco.budget.integer_program import Choice, IntegerProgram
from lightning_cco.budget.option import FLOAT, INTEGER, Option
from lightning_cco.budget.options import Choices
from lightning_cco.budget.speed import SpeedModel
from lightning_cco.errors import CCOError

Measure = Callable[[Option], float] | SpeedModel
"""What an option takes of the budget; of seconds, what a choice takes as a whole, since conversions between layers do not belong to one of them."""
Limit = tuple[Measure, float]
_WORTH = 0.01
"""A layer stays in float where that saves more than this part of what 8 bits everywhere lose: float is slower."""


def need_scipy() -> None:
    """Say before a training that the solver is missing.

    Raises:
        CCOError: SciPy is not there.
    """
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise CCOError(
            'budget_settings: the choice is an integer program that SciPy solves, and SciPy is not there. Run: pip install "lightning-cco[budget]", '
            "or leave budget_settings out."
        ) from error


def solve(made: Choices, measure: Measure, limit: float | None, also: Sequence[Limit] = ()) -> Choice | None:
    """The choice with the least expected rise of the loss within a limit.

    Args:
        made: What can be chosen.
        measure: What each option takes.
        limit: How much there is in all; `None`: the choice that takes least, whatever the loss.
        also: Further limits, which hold as well.

    Returns:
        The choice; `None` if nothing is within the limit.
    """
    program = IntegerProgram(made, [entry for entry in (measure, *(entry for entry, _ in also)) if isinstance(entry, SpeedModel)])
    for other, most in [*([(measure, limit)] if limit is not None else []), *also]:
        program.limit(_taken(program, other), most)
    taken, _ = _taken(program, measure)
    unit = max(1e-12, float(np.abs(taken).sum()))
    rises = _rises(made, program)
    # Of equal rises the smaller one, and of the smallest the one with least rise.
    objective = rises + 1e-9 * taken / unit if limit is not None else taken / unit * 1e3 + rises * 1e-9
    return program.least(objective * 1e3)


def _taken(program: IntegerProgram, measure: Measure) -> tuple[Any, float]:
    """What each column takes, and what is taken whatever is chosen."""
    found = np.zeros(len(program.whole))
    if isinstance(measure, SpeedModel):
        speed = program.speeds[id(measure)]
        found[list(speed.seconds)] = list(speed.seconds.values())
        return found, speed.fixed
    found[: len(program.options)] = [measure(option) for _, option in program.options]
    return found, 0.0


def _rises(made: Choices, program: IntegerProgram) -> Any:
    """The expected rise of the loss by column, as a part of the largest; a layer in float counts a little, since float is slower."""
    rises = np.zeros(len(program.whole))
    least = _WORTH * rise_of(made, uniform(made, "W8A8", 8))
    own = [option.rise + (least if option.form == FLOAT and math.isfinite(least) else 0.0) for _, option in program.options]
    own += [tensor.rises[bits] for tensor, bits in program.tensors]
    rises[: len(own)] = own
    largest = max(1e-300, float(np.max(rises[np.isfinite(rises)], initial=0.0)))
    return np.where(np.isfinite(rises), rises / largest, 1e6)


def uniform(made: Choices, name: str, activations: int) -> Choice:
    """What the plan of equal bits everywhere chooses."""
    chosen = tuple(group.uniforms[name] for group in made.groups)
    wanted = {
        key for group, option in zip(made.groups, chosen, strict=True) if option.form == INTEGER for key in (*group.inputs, *group.outputs)
    }
    return Choice(chosen, {tensor.key: activations for tensor in made.tensors if not tensor.optional or tensor.key in wanted})


def rise_of(made: Choices, choice: Choice) -> float:
    """The expected rise of the loss of a choice: all roundings together."""
    return sum(option.rise for option in choice.options) + sum(made.every_rise[key].get(bits, 0.0) for key, bits in choice.tensors.items())


def taken_of(choice: Choice, measure: Measure) -> float:
    """What a choice takes."""
    if isinstance(measure, SpeedModel):
        return measure.seconds(choice.options)
    return sum(measure(option) for option in choice.options)


def spread(low: float, high: float, count: int) -> Sequence[float]:
    """So many limits between two, at equal ratios."""
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)] if 0 < low < high else [low]
