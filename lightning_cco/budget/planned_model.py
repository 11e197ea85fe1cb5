"""The model of a search: planned by one recipe after another, calibrated for each, and exported to see what that takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from lightning_cco.budget.integer_program import Choice
from lightning_cco.budget.options import Choices, tail_rules
from lightning_cco.budget.plan import budget_rules
from lightning_cco.budget.rules import rules_of
from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.settings import LayerRule, Settings, load_settings

Calibrate = Callable[[Iterable[str]], Any]
"""Finds the ranges of the quantizers with these names."""


class PlannedModel:
    """A hooked model that is planned anew again and again.

    Args:
        quantized: The model, calibrated for the user's own recipe.
        settings: The user's recipe.
        calibrate: Calibrates quantizers that are new.
        export_bytes: Exports the model as it is planned at the time, and returns the bytes of the file; `None`: nothing is exported.
        agree: Makes the value of the first process that of all of them.
    """

    def __init__(
        self,
        quantized: HookedModel,
        settings: Settings,
        calibrate: Calibrate,
        export_bytes: Callable[[], int] | None = None,
        agree: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self.quantized, self.settings, self.calibrate = quantized, settings, calibrate
        self.export_bytes, self.agree = export_bytes, agree

    def replan(self, settings: Settings) -> None:
        """Plan the model by a recipe, and calibrate what is new."""
        new = self.quantized.replan(settings, self.quantized.plan.suggestions)
        if new:
            self.calibrate(new)

    def everything(self) -> Settings:
        """The recipe with everything quantized that can be, the tail included."""
        whole = load_settings(self.settings)
        whole.layer_settings = [rule for rule in whole.layer_settings if rule.by != "budget"]
        whole.layer_settings += tail_rules(self.quantized.plan, self.settings)
        whole.global_quantization_settings.skip_tail_quantization = False
        return whole

    def recipe_of(self, made: Choices, base: QuantizationPlan, choice: Choice | None) -> Settings:
        """The recipe of a choice; of `None`, that of the model in float."""
        planned = load_settings(self.settings)
        planned.global_quantization_settings.skip_tail_quantization = False
        if choice is None:
            planned.layer_settings = [_all_in_float()]
            return planned
        bits = {spec.layer: spec.num_bits for spec in base.tensors.values()}
        planned.layer_settings = [rule for rule in planned.layer_settings if rule.by != "budget"]
        planned.layer_settings += rules_of(made, choice, budget_rules(base.settings), bits)
        return planned

    def float_file_bytes(self) -> int | None:
        """Bytes of the file with nothing quantized; `None` where nothing is exported. The model is planned as before then."""
        if self.export_bytes is None:
            return None
        quantized, settings = self.quantized, load_settings(self.settings)
        before = quantized.settings, quantized.plan.suggestions, quantized.activations, quantized.weights
        settings.layer_settings = [_all_in_float()]
        try:
            quantized.replan(settings)
            return self.file_bytes()
        finally:
            quantized._activations, quantized.weights = before[2:]
            quantized.replan(*before[:2])

    def file_bytes(self) -> int | None:
        """Bytes of the file of the model as it is planned; `None` where nothing is exported, or the export fails, which is said once."""
        if self.export_bytes is None:
            return None
        taken, problem = 0, ""
        try:
            taken = self.export_bytes()
        except CCOError as error:
            problem = str(error)
        taken, problem = self.agree((taken, problem))
        if problem:
            warnings.warn(
                f"budget_settings.size: the export that was to measure the file failed, so its size is computed from the weights: {problem}",
                CCOWarning,
                stacklevel=3,
            )
            self.export_bytes = None
            return None
        return int(taken)


def _all_in_float() -> LayerRule:
    return LayerRule(skip_quantization=True, match="*", by="budget")
