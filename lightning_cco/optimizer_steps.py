"""Steps of optimizers that run the model several times (LBFGS and its line search): no range moves within one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_cco.quantized_model import QuantizedModel


class OptimizerSteps:
    """Holds the ranges of a model while an optimizer makes a step.

    A line search compares losses, so ranges that moved between two of its forwards would change the function that it searches. What all of them have shown
    moves the ranges after the step.
    """

    def __init__(self) -> None:
        self._quantized: QuantizedModel | None = None
        self._handles: list[Any] = []

    def watch(self, optimizers: Iterable[Any], quantized: QuantizedModel) -> None:
        """Follow the steps of these optimizers from now on."""
        self.release()
        self._quantized = quantized
        for optimizer in optimizers:
            if hasattr(optimizer, "register_step_pre_hook"):
                self._handles.append(optimizer.register_step_pre_hook(lambda *_: quantized.hold_ranges(True)))
                self._handles.append(optimizer.register_step_post_hook(lambda *_: quantized.hold_ranges(False)))

    def release(self) -> None:
        """Leave the optimizers; a step that an exception has left is over, too."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._quantized is not None:
            self._quantized.hold_ranges(False)
            self._quantized = None
