"""What is measured of a compressed model at the end of an epoch: sensitivities, the use of the levels, and what they suggest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from lightning_cco.batches import ForwardFn, model_context, on_a_copy
from lightning_cco.budgeted import loss_of_step, measure_loss_sensitivity, measures_loss, weight_counts
from lightning_cco.level_use import LayerLevels, LevelWatch
from lightning_cco.loss_sensitivity import LossSensitivityReport
from lightning_cco.quantized_model import QuantizedModel
from lightning_cco.sensitivity import SensitivityReport
from lightning_cco.settings import Settings
from lightning_cco.suggestions import Suggestion, suggest_skips


@dataclass(frozen=True)
class EpochMeasurement:
    """One epoch's measurement.

    Attributes:
        report: The sensitivity of each layer.
        losses: The expected rise of the loss by each rounding; `None` where the recipe does not ask for it.
        levels: Shares of clipped values and of oscillating weights of each layer.
        suggestions: Layers that should be skipped.
    """

    report: SensitivityReport
    losses: LossSensitivityReport | None
    levels: dict[str, LayerLevels]
    suggestions: list[Suggestion]


def measure_epoch(
    trainer: pl.Trainer, quantized: QuantizedModel, forward: ForwardFn, held: Sequence[Any], settings: Settings, watch: LevelWatch
) -> EpochMeasurement:
    """Measure a model on the held batches; nothing of it changes.

    Args:
        trainer: The Trainer.
        quantized: The module, calibrated.
        forward: How a batch goes through it.
        held: The batches.
        settings: The recipe.
        watch: Follows levels from epoch to epoch.

    Raises:
        CCOError: The loss sensitivity is asked for, and this process holds only parts of the parameters.
    """
    with model_context(trainer):
        report = quantized.sensitivity(held, on_a_copy(forward), settings.monitoring_settings.sensitivity_modes)
        levels = watch.measure(quantized, lambda: on_a_copy(forward)(quantized.model, held[0]))
    losses = None
    if measures_loss(settings):
        losses = measure_loss_sensitivity(trainer, quantized, forward, held, loss_of_step(trainer, quantized, held[0]))
    suggestions = suggest_skips(report, quantized.plan, settings, losses, weight_counts(quantized))
    return EpochMeasurement(report, losses, levels, suggestions)
