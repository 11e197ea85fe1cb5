"""A choice as an integer program, solved by `scipy.optimize.milp`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_cco.budget.option import INTEGER, Option
from lightning_cco.budget.options import Choices
from lightning_cco.budget.speed import SpeedModel
from lightning_cco.budget.speed_rows import Row, SpeedRows
from lightning_cco.quantization.tensor_key import TensorKey

_SECONDS = 60.0


@dataclass(frozen=True)
class Choice:
    """One option for each group, and the bits of each tensor that is rounded."""

    options: tuple[Option, ...]
    tensors: dict[TensorKey, int]


class IntegerProgram:
    """Binary variables and what binds them.

    There is a variable for each option of each group, and one for each number of bits of each tensor. A group that runs in integers needs what it reads
    rounded to the bits of its option, and what it makes rounded to some.

    Args:
        made: What can be chosen.
        speeds: Models of speed that limits or objectives count by; they bring variables of their own.

    Attributes:
        options: Number of the group and option, for each of the first columns.
        tensors: Tensor and bits, for each of the columns after them.
        whole: For each column whether it must be an integer (1), or is one automatically at the optimum (0).
        speeds: What each model of speed has added, by its identity.
    """

    def __init__(self, made: Choices, speeds: Sequence[SpeedModel] = ()) -> None:
        self.made = made
        self.options = [(number, option) for number, group in enumerate(made.groups) for option in group.options]
        self.tensors = [(tensor, bits) for tensor in made.tensors for bits in tensor.rises]
        self._column = {(tensor.key, bits): len(self.options) + i for i, (tensor, bits) in enumerate(self.tensors)}
        self._rows: list[Row] = []
        self.whole = [1] * (len(self.options) + len(self.tensors))
        self._of_group: dict[int, list[int]] = {}
        for i, (number, _) in enumerate(self.options):
            self._of_group.setdefault(number, []).append(i)
        self._rows += [(dict.fromkeys(its, 1.0), 1.0, 1.0) for its in self._of_group.values()]
        for tensor in made.tensors:
            its = dict.fromkeys((self._column[tensor.key, bits] for bits in tensor.rises), 1.0)
            self._rows.append((its, 0.0 if tensor.optional else 1.0, 1.0))
        self._round_what_integers_read()
        self.speeds: dict[int, SpeedRows] = {}
        for speed in speeds:
            self._count_time(speed)

    def _round_what_integers_read(self) -> None:
        by_key = {tensor.key: tensor for tensor in self.made.tensors}
        for number, group in enumerate(self.made.groups):
            for place, key in enumerate((*group.inputs, *group.outputs)):
                if key not in by_key:
                    continue
                # A group has one option, so all that need the same of a tensor are bound at once: fewer rows, and a closer bound than one for each.
                alike: dict[tuple[int, ...], list[int]] = {}
                for i in self._of_group[number]:
                    option = self.options[i][1]
                    exact = place < len(group.inputs) and option.activations in by_key[key].rises
                    if option.form == INTEGER:
                        alike.setdefault((option.activations,) if exact else tuple(by_key[key].rises), []).append(i)
                for needed, its in alike.items():
                    row = {**dict.fromkeys(its, 1.0), **{self._column[key, bits]: -1.0 for bits in needed}}
                    self._rows.append((row, -math.inf, 0.0))

    def _count_time(self, speed: SpeedModel) -> None:
        if id(speed) in self.speeds:
            return
        columns = {number: [(i, self.options[i][1]) for i in its] for number, its in self._of_group.items()}
        further = self.speeds[id(speed)] = SpeedRows(speed, columns, len(self.whole))
        self._rows += further.rows
        self.whole += further.whole

    def limit(self, taken: tuple[Any, float], most: float) -> None:
        """Bind what all columns take together.

        Args:
            taken: What each column takes, and what is taken whatever is chosen.
            most: How much there is.
        """
        parts, anyway = taken
        scale = max(1e-12, float(np.abs(parts).sum()))
        self._rows.append(({place: value / scale for place, value in enumerate(parts) if value}, -math.inf, (most - anyway) / scale))

    def least(self, objective: Any) -> Choice | None:
        """The choice whose columns sum up to least; `None` if there is none."""
        while True:
            values = self._solution(objective)
            if values is None:
                return None
            picked = values > 0.5
            chosen = {number: option for i, (number, option) in enumerate(self.options) if picked[i]}
            choice = Choice(
                tuple(chosen[number] for number in range(len(self.made.groups))),
                {tensor.key: bits for i, (tensor, bits) in enumerate(self.tensors) if picked[len(self.options) + i]},
            )
            more = [row for speed in self.speeds.values() for row in speed.loops(choice.options, values)]
            if not more:
                return choice
            self._rows += more

    def _solution(self, objective: Any) -> Any:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array

        data = [(value, r, c) for r, (entries, _, _) in enumerate(self._rows) for c, value in entries.items()]
        values, r, c = (np.array(part) for part in zip(*data, strict=True))
        matrix = coo_array(
            (values.astype(float), (r.astype(np.int32), c.astype(np.int32))), shape=(len(self._rows), len(self.whole))
        ).tocsr()
        return milp(
            objective,
            integrality=np.array(self.whole),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, [low for _, low, _ in self._rows], [high for _, _, high in self._rows]),
            options={"time_limit": _SECONDS, "mip_rel_gap": 1e-6},
        ).x
