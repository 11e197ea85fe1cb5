"""The bounds of a clamp, so that a quantizer after it can clamp instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Limits = Callable[[tuple[Any, ...], dict[str, Any]], "tuple[float, float] | None"]
"""Smallest and largest result of a call, from its arguments; `None` if they vary within it."""


def _clamp_limits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float] | None:
    low = args[1] if len(args) > 1 else kwargs.get("min", kwargs.get("min_val"))
    high = args[2] if len(args) > 2 else kwargs.get("max", kwargs.get("max_val"))
    if any(isinstance(bound, Tensor) for bound in (low, high)):
        return None
    return (float("-inf") if low is None else float(low), float("inf") if high is None else float(high))


def _one_limit(keyword: str) -> Limits:
    def limits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float] | None:
        return _clamp_limits((), {keyword: args[1] if len(args) > 1 else kwargs.get(keyword)})

    return limits


def _hardtanh_limits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float]:
    low = args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)
    high = args[2] if len(args) > 2 else kwargs.get("max_val", 1.0)
    return float(low), float(high)


def _relu_limits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float]:
    return 0.0, float("inf")


def _relu6_limits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float]:
    return 0.0, 6.0


LIMITS: dict[str, Limits] = {
    **dict.fromkeys(("relu", "relu_"), _relu_limits),
    **dict.fromkeys(("relu6",), _relu6_limits),
    **dict.fromkeys(("hardtanh", "hardtanh_"), _hardtanh_limits),
    **dict.fromkeys(("clamp", "clamp_", "clip", "clip_"), _clamp_limits),
    **dict.fromkeys(("clamp_min", "clamp_min_"), _one_limit("min")),
    **dict.fromkeys(("clamp_max", "clamp_max_"), _one_limit("max")),
}
"""The interval that a function clamps to, from its arguments; a quantizer on its output then clamps by itself."""
