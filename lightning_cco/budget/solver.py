"""The choice itself: an integer program, solved by `scipy.optimize.milp`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_cco.budget.option import FLOAT, INTEGER, Option
from lightning_cco.budget.options import Choices
from lightning_cco.budget.speed import SpeedModel, SpeedRows
from lightning_cco.errors import CCOError
from lightning_cco.quantization.tensor_key import TensorKey

Measure = Callable[[Option], float] | SpeedModel
"""What an option takes of the budget; of seconds, what a choice takes as a whole, since conversions between layers do not belong to one of them."""
Limit = tuple[Measure, float]
_SECONDS = 60.0
_WORTH = 0.01
"""A layer stays in float where that saves more than this part of what 8 bits everywhere lose: float is slower."""


@dataclass(frozen=True)
class Choice:
    """One option for each group, and the bits of each tensor that is rounded."""

    options: tuple[Option, ...]
    tensors: dict[TensorKey, int]


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

    One binary variable stands for each option of each group, one for each number of bits of each tensor. A group that runs in integers needs what it reads
    rounded to the bits of its option, and what it makes rounded to some.

    Args:
        made: What can be chosen.
        measure: What each option takes.
        limit: How much there is in all; `None`: the choice that takes least, whatever the loss.
        also: Further limits, which hold as well.

    Returns:
        The choice; `None` if nothing is within the limit.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    options = [(number, option) for number, group in enumerate(made.groups) for option in group.options]
    tensors = [(tensor, bits) for tensor in made.tensors for bits in tensor.rises]
    column = {(tensor.key, bits): len(options) + i for i, (tensor, bits) in enumerate(tensors)}
    size = len(options) + len(tensors)
    rows: list[tuple[dict[int, float], float, float]] = []
    of_group: dict[int, list[int]] = {}
    for i, (number, _) in enumerate(options):
        of_group.setdefault(number, []).append(i)
    rows += [(dict.fromkeys(its, 1.0), 1.0, 1.0) for its in of_group.values()]
    by_key = {tensor.key: tensor for tensor in made.tensors}
    for tensor in made.tensors:
        its = dict.fromkeys((column[tensor.key, bits] for bits in tensor.rises), 1.0)
        rows.append((its, 0.0 if tensor.optional else 1.0, 1.0))
    for i, (number, option) in enumerate(options):
        if option.form != INTEGER:
            continue
        group = made.groups[number]
        for place, key in enumerate((*group.inputs, *group.outputs)):
            if key not in by_key:
                continue
            exact = place < len(group.inputs) and option.activations in by_key[key].rises
            needed = [option.activations] if exact else list(by_key[key].rises)
            rows.append(({i: 1.0, **{column[key, bits]: -1.0 for bits in needed}}, -math.inf, 0.0))
    rises = np.array([option.rise for _, option in options] + [tensor.rises[bits] for tensor, bits in tensors])
    columns = {number: [(i, options[i][1]) for i in its] for number, its in of_group.items()}
    whole = [1] * size
    speeds: dict[int, SpeedRows] = {}
    for other in (measure, *(entry for entry, _ in also)):
        if isinstance(other, SpeedModel) and id(other) not in speeds:
            further = speeds[id(other)] = other.rows(columns, len(whole))
            rows += further.rows
            whole += further.whole

    def takes(of: Measure) -> tuple[Any, float]:
        """What each column takes, and what is taken whatever is chosen."""
        found = np.zeros(len(whole))
        if isinstance(of, SpeedModel):
            for place, value in speeds[id(of)].seconds.items():
                found[place] = value
            return found, speeds[id(of)].fixed
        found[: len(options)] = [of(option) for _, option in options]
        return found, 0.0

    taken, _ = takes(measure)
    rises = np.concatenate([rises, np.zeros(len(whole) - size)])
    least = _WORTH * rise_of(made, uniform(made, "W8A8", 8))
    rises[: len(options)] += [least if option.form == FLOAT and math.isfinite(least) else 0.0 for _, option in options]
    largest = max(1e-300, float(np.max(rises[np.isfinite(rises)], initial=0.0)))
    rises = np.where(np.isfinite(rises), rises / largest, 1e6)
    unit = max(1e-12, float(np.abs(taken).sum()))
    for other, most in [*([(measure, limit)] if limit is not None else []), *also]:
        parts, anyway = takes(other)
        scale = max(1e-12, float(np.abs(parts).sum()))
        rows.append(({place: value / scale for place, value in enumerate(parts) if value}, -math.inf, (most - anyway) / scale))
    # Of equal rises the smaller one, and of the smallest the one with least rise.
    objective = rises + 1e-9 * taken / unit if limit is not None else taken / unit * 1e3 + rises * 1e-9
    while True:
        data = [(value, r, c) for r, (entries, _, _) in enumerate(rows) for c, value in entries.items()]
        values, r, c = (np.array(part) for part in zip(*data, strict=True))
        matrix = coo_array((values.astype(float), (r.astype(int), c.astype(int))), shape=(len(rows), len(whole))).tocsr()
        found: Any = milp(
            objective * 1e3,
            integrality=np.array(whole),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows]),
            options={"time_limit": _SECONDS, "mip_rel_gap": 1e-6},
        )
        if found.x is None:
            return None
        picked = found.x > 0.5
        chosen = {number: option for i, (number, option) in enumerate(options) if picked[i]}
        choice = Choice(
            tuple(chosen[number] for number in range(len(made.groups))),
            {tensor.key: bits for i, (tensor, bits) in enumerate(tensors) if picked[len(options) + i]},
        )
        more = [row for speed in speeds.values() for row in speed.loops(choice.options, found.x)]
        if not more:
            return choice
        rows += more


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
