"""The kinds of reasons for leaving a layer in float, and how one is written."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class SkipReason(str, Enum):
    """The kind of reason. Each equals its word."""

    TAIL = "tail"
    """It is the last layer with weights before an output, or comes after it."""
    SETTING = "setting"
    """A rule of the recipe says so."""
    SUGGESTION = "suggestion"
    """Its Quantization Sensitivity was above the threshold."""
    BUDGET = "budget"
    """In float it costs less of the accuracy than it takes of the budget."""
    ENGINE = "engine"
    """Its engine, or what stands around it, leaves it in float."""
    WEIGHT_ONLY = "weight-only"
    """It is computed in float from integer weights."""
    INTEGER = "integer"
    """Its values are integers."""
    UNSUPPORTED = "unsupported"
    """It has no INT8 kernel."""
    OUTPUT = "output"
    """It only marks where the model returns a tensor."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Skip:
    """A reason, and the same in a sentence.

    Attributes:
        reason: The kind of reason.
        detail: A sentence for people.
        by_setting: Of `SkipReason.WEIGHT_ONLY`: whether a setting asks for it; otherwise the engine has no other way.

    >>> print(Skip(SkipReason.ENGINE, "no INT8 layer reads it"))
    no INT8 layer reads it
    >>> print(Skip(SkipReason.SETTING, "layer_settings[0], match 'conv'"))
    setting: layer_settings[0], match 'conv'
    """

    reason: SkipReason
    detail: str = ""
    by_setting: bool = False

    def __str__(self) -> str:
        if self.detail and self.reason in _SAID_IN_FULL:
            return self.detail
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)


_SAID_IN_FULL = (SkipReason.ENGINE, SkipReason.INTEGER, SkipReason.UNSUPPORTED)  # their sentences need no word before them
