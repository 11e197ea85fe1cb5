"""What is measured of a compressed model at the end of an epoch, and shown: sensitivities, the use of the levels, and what they suggest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_cco.batches import ForwardFn, model_context, on_a_copy
from lightning_cco.budget_run import loss_of_step, measure_loss_sensitivity, measures_loss, weight_counts
from lightning_cco.compat.lightning_trainer import logged_step
from lightning_cco.initial_evaluation import InitialEvaluation
from lightning_cco.level_use import LayerLevels, LevelWatch
from lightning_cco.loss_sensitivity import LossSensitivityReport
from lightning_cco.monitoring import Monitor
from lightning_cco.monitoring.epoch import EpochMetrics, EpochResults
from lightning_cco.monitoring.metric_modes import metric_directions
from lightning_cco.monitoring.metrics import monitored_values, numbers
from lightning_cco.quantized_model import QuantizedModel
from lightning_cco.report_page.facts import model_facts
from lightning_cco.sensitivity import SensitivityReport
from lightning_cco.settings import Settings
from lightning_cco.suggestions import Suggestion, suggest_skips


class EpochMeasurements:
    """What was measured at the end of the last epoch.

    Args:
        settings: The recipe.

    Attributes:
        report: The sensitivity of each layer; `None` before the first measurement.
        losses: The expected rise of the loss by each rounding; `None` where the recipe does not ask for it.
        levels: Shares of clipped values and of oscillating weights of each layer.
        suggestions: Layers that should be skipped.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.report: SensitivityReport | None = None
        self.losses: LossSensitivityReport | None = None
        self.levels: dict[str, LayerLevels] = {}
        self.suggestions: list[Suggestion] = []
        self._watch = LevelWatch()

    def measure(self, trainer: pl.Trainer, quantized: QuantizedModel, forward: ForwardFn, held: Sequence[Any]) -> None:
        """Measure a model on the held batches; nothing of it changes.

        Args:
            trainer: The Trainer.
            quantized: The module, calibrated.
            forward: How a batch goes through it.
            held: The batches.

        Raises:
            CCOError: The loss sensitivity is asked for, and this process holds only parts of the parameters.
        """
        with model_context(trainer):
            report = quantized.sensitivity(held, on_a_copy(forward), self.settings.monitoring_settings.sensitivity_modes)
            self.levels = self._watch.measure(quantized, lambda: on_a_copy(forward)(quantized.model, held[0]))
        losses = None
        if measures_loss(self.settings):
            losses = self.losses = measure_loss_sensitivity(trainer, quantized, forward, held, loss_of_step(trainer, quantized, held[0]))
        self.report = report
        self.suggestions = suggest_skips(report, quantized.plan, self.settings, losses, weight_counts(quantized))

    def show(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        quantized: QuantizedModel,
        monitor: Monitor,
        before_training: InitialEvaluation,
    ) -> None:
        """Log and draw what was measured, together with the metrics of the epoch.

        Args:
            trainer: The Trainer.
            module: Its module, which logs.
            quantized: The same, quantized.
            monitor: What shows it.
            before_training: The metrics before training.
        """
        assert self.report is not None
        if measures_loss(self.settings):
            assert self.losses is not None
            monitor.on_losses(trainer.current_epoch, logged_step(trainer), quantized.plan, self.losses, self.settings)
        if not trainer.barebones:
            for name, value in monitored_values(self.report, quantized, self.suggestions).items():
                module.log(name, value, on_step=False, on_epoch=True, batch_size=1, rank_zero_only=True)
        metrics = numbers(trainer.callback_metrics)
        results = EpochResults(
            epoch=trainer.current_epoch,
            step=logged_step(trainer),
            plan=quantized.plan,
            settings=self.settings,
            report=self.report,
            metrics=EpochMetrics(metrics, before_training.original, before_training.calibrated, metric_directions(trainer, metrics)),
            suggestions=self.suggestions,
            levels=self.levels,
            views=self._watch.views,
            facts=model_facts(quantized),
        )
        monitor.on_epoch(results)
