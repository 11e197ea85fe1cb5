"""The metrics before training: of the float model, and of the calibrated one, by Trainer's own validation of the sanity check."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_cco.compat.lightning_trainer import sanity_check, validation_loader_replaced
from lightning_cco.monitoring.metrics import numbers, sanity_check_metrics
from lightning_cco.random_numbers import isolated_random
from lightning_cco.settings import TrainingSettings
from lightning_cco.spare_loader import spare_loader


class InitialEvaluation:
    """Validates before the first step: the float model in the place of the sanity check, the calibrated one after the calibration.

    Attributes:
        original: Metrics of the float model.
        calibrated: Metrics after the calibration, before any training.
    """

    def __init__(self) -> None:
        self.original: dict[str, float] = {}
        self.calibrated: dict[str, float] = {}
        self._steps: int | float | None = None
        self._of_calibrated = False

    def lengthen(self, trainer: pl.Trainer) -> None:
        """Let the sanity check run the whole validation."""
        if not trainer.fast_dev_run and not trainer.barebones:  # type: ignore[attr-defined]
            self._steps = trainer.num_sanity_val_steps
            trainer.num_sanity_val_steps = float("inf")

    def restore(self, trainer: pl.Trainer) -> None:
        """Put the sanity check's number of steps back."""
        if self._steps is not None:
            trainer.num_sanity_val_steps, self._steps = self._steps, None

    def keep(self, trainer: pl.Trainer) -> None:
        """A validation has ended: keep its metrics if it was one of those before training."""
        if trainer.sanity_checking and self._of_calibrated:
            self.calibrated = numbers(sanity_check_metrics(trainer))
        elif trainer.sanity_checking and self._steps is not None:
            self.original = numbers(sanity_check_metrics(trainer))

    def evaluate_calibrated(self, trainer: pl.Trainer, settings: TrainingSettings, progress_has_begun: bool) -> None:
        """Validate the calibrated model once.

        Samplers and generators are copies, so is what a data set keeps between its samples, and random numbers are put back: the training sees
        what it would have seen. Where there is no copy, as of streams, this is left out.

        Args:
            trainer: The Trainer.
            settings: Whether to.
            progress_has_begun: Whether the progress bar knows already that the training has begun.
        """
        if settings.skip_calibrated_evaluation or trainer.fast_dev_run or trainer.barebones:  # type: ignore[attr-defined]
            return
        self.validate(trainer, progress_has_begun)
        if self.calibrated:
            said = ", ".join(f"{name}: {value:.4g}" for name, value in self.calibrated.items())
            rank_zero_info(f"After the calibration, before any training: {said}.")

    def validate(self, trainer: pl.Trainer, progress_has_begun: bool) -> dict[str, float]:
        """The metrics of the model as it is now, as in `evaluate_calibrated`. Empty where there is no copy of the loaders."""
        self.calibrated = {}
        steps, self._of_calibrated = trainer.num_sanity_val_steps, True
        trainer.num_sanity_val_steps = float("inf")
        try:
            with isolated_random(), validation_loader_replaced(trainer, lambda loader: spare_loader(trainer, loader)) as replaced:
                if replaced:
                    sanity_check(trainer, progress_has_begun)
        finally:
            trainer.num_sanity_val_steps, self._of_calibrated = steps, False
        return self.calibrated

    def load(self, original: Mapping[str, float], calibrated: Mapping[str, float]) -> None:
        """Go on with the metrics of a checkpoint."""
        self.original, self.calibrated = dict(original), dict(calibrated)
