"""What modules hold beside tensors and a training may change, such as a temperature or a depth: the teacher computes with the student's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, type(None))


class PlainState:
    """The numbers, words and flags of a student and its teacher.

    What differs between the two from the start belongs to their modes, since the teacher is in evaluation mode, and stays as it is.

    Args:
        student: The model, in training mode.
        teacher: A copy of it, in evaluation mode.

    Example:
        >>> student, teacher = nn.Softplus(), nn.Softplus()
        >>> plain = PlainState(student, teacher)
        >>> student.beta = 0.5
        >>> plain.give_teacher(plain.of_student())
        >>> teacher.beta
        0.5
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self._held: list[tuple[dict[str, Any], dict[str, Any], str]] = []
        for mine, theirs in zip(student.modules(), teacher.modules(), strict=True):
            ours, copied = vars(mine), vars(theirs)
            for name, value in ours.items():
                if (
                    name not in _OF_ALL
                    and name in copied
                    and type(value) in _PLAIN
                    and type(copied[name]) in _PLAIN
                    and value == copied[name]
                ):
                    self._held.append((ours, copied, name))

    def of_student(self) -> list[Any]:
        """The student's values, as they are now."""
        return [held.get(name) for held, _, name in self._held]

    def give_teacher(self, values: Sequence[Any]) -> None:
        """Let the teacher have values of the student. Tensors and other objects that have taken their place remain each one's own."""
        for (_, held, name), value in zip(self._held, values, strict=False):
            if type(value) in _PLAIN:
                held[name] = value


_OF_ALL = frozenset(vars(nn.Module()))
