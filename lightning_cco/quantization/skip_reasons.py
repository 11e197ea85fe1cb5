"""Why a layer is left in float."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class SkipReason(str, Enum):
    """The kind of reason. Each equals its word."""

    TAIL = "tail"
    """It stands between an output and the last weighted layer before it."""
    SETTING = "setting"
    """A rule of the recipe says so."""
    SUGGESTION = "suggestion"
    """Its Quantization Sensitivity was above the threshold."""
    BUDGET = "budget"
    """In float it costs less of the accuracy than it takes of the budget."""
    RULE = "rule"
    """Its engine, or what it reads, leaves it in float."""
    WEIGHT_ONLY = "weight-only"
    """It is computed in float from integer weights."""
    INTEGER = "integer"
    """Its values are integers."""
    UNSUPPORTED = "unsupported"
    """It has no INT8 form."""
    OUTPUT = "output"
    """It only marks where the model returns a tensor."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Skip:
    """A reason, and the same in a sentence.

    >>> print(Skip(SkipReason.RULE, "no INT8 layer reads it"))
    rule: no INT8 layer reads it
    """

    reason: SkipReason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)
