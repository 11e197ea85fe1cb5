"""The metrics before training: of the float model, and of the calibrated one, by validations of the Trainer's own that leave nothing behind."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_cco.compat.lightning_trainer import sanity_check, validation_loader, validation_loader_replaced
from lightning_cco.graph.snapshot import Snapshot
from lightning_cco.loader_copy import copied_loader, keeping_global_state
from lightning_cco.monitoring.metrics import numbers, sanity_check_metrics
from lightning_cco.random_numbers import isolated_random
from lightning_cco.repeatable_data import gives_again
from lightning_cco.settings import TrainingSettings


class InitialEvaluation:
    """Validates before the first step: the float model, and after the calibration the calibrated one, on copies of the validation's loaders.

    Where there is no copy, but data that give the same again, the float model is validated in the place of the sanity check. What may give each sample once (a
    queue, an iterator) is left as it is, and nothing is validated.

    Attributes:
        original: Metrics of the float model.
        calibrated: Metrics after the calibration, before any training.
    """

    def __init__(self) -> None:
        self.original: dict[str, float] = {}
        self.calibrated: dict[str, float] = {}
        self._steps: int | float | None = None
        self._apart: dict[str, float] | None = None

    def lengthen(self, trainer: pl.Trainer) -> None:
        """Let the sanity check run the whole validation, of data that give the same again but can't be copied."""
        if self._apart is not None or trainer.fast_dev_run or trainer.barebones:  # type: ignore[attr-defined]
            return
        loader = validation_loader(trainer)
        if loader is None or copied_loader(trainer, loader, streams=True) is not None or not all(map(gives_again, loader.flattened)):
            return
        self._steps = trainer.num_sanity_val_steps
        trainer.num_sanity_val_steps = float("inf")

    def restore(self, trainer: pl.Trainer) -> None:
        """Put the sanity check's number of steps back."""
        if self._steps is not None:
            trainer.num_sanity_val_steps, self._steps = self._steps, None

    def keep(self, trainer: pl.Trainer) -> None:
        """A validation has ended: keep its metrics if it was one of those before training."""
        if trainer.sanity_checking and self._apart is not None:
            self._apart = numbers(sanity_check_metrics(trainer))
        elif trainer.sanity_checking and self._steps is not None:
            self.original = numbers(sanity_check_metrics(trainer))

    def evaluate_original(self, trainer: pl.Trainer, progress_has_begun: bool) -> None:
        """Validate the float model, if the sanity check has not done that; see `validate`."""
        if not self.original and not trainer.fast_dev_run and not trainer.barebones:  # type: ignore[attr-defined]
            self.original = self.validate(trainer, progress_has_begun)
            if not self.original and validation_loader(trainer) is not None and not self._is_read_apart(trainer):
                rank_zero_info(
                    "CCOCallback: the float model is not validated before the training: the validation's data may give each sample once "
                    "(an iterator, a queue, an open file), and are left to the training."
                )

    def evaluate_calibrated(self, trainer: pl.Trainer, settings: TrainingSettings, progress_has_begun: bool) -> None:
        """Validate the calibrated model once; see `validate`.

        Args:
            trainer: The Trainer.
            settings: Whether to.
            progress_has_begun: Whether the progress bar knows already that the training has begun.
        """
        if settings.skip_calibrated_evaluation or trainer.fast_dev_run or trainer.barebones:  # type: ignore[attr-defined]
            return
        self.calibrated = self.validate(trainer, progress_has_begun)
        if self.calibrated:
            said = ", ".join(f"{name}: {value:.4g}" for name, value in self.calibrated.items())
            rank_zero_info(f"After the calibration, before any training: {said}.")

    def validate(self, trainer: pl.Trainer, progress_has_begun: bool) -> dict[str, float]:
        """The metrics of the model as it is now. Empty where there is no copy of the loaders, as of queues.

        Samplers and generators are copies, so is what a data set keeps between its samples. Random numbers, and what the module, the data module and the user's
        callbacks keep, are put back: the training sees what it would have seen.
        """
        self._apart = {}
        others = [*trainer.callbacks, getattr(trainer, "datamodule", None)]  # type: ignore[attr-defined]
        steps, kept = trainer.num_sanity_val_steps, Snapshot(trainer.lightning_module, others=others)
        trainer.num_sanity_val_steps = float("inf")
        try:
            with ExitStack() as stack:
                stack.enter_context(isolated_random())
                stack.enter_context(kept)

                def copy_of(loader: CombinedLoader) -> CombinedLoader | None:
                    spare = copied_loader(trainer, loader, streams=True)
                    if spare is not None:
                        stack.enter_context(keeping_global_state(spare))
                    return spare

                if stack.enter_context(validation_loader_replaced(trainer, copy_of)):
                    sanity_check(trainer, progress_has_begun)
            return self._apart
        finally:
            trainer.num_sanity_val_steps, self._apart = steps, None

    @staticmethod
    def _is_read_apart(trainer: pl.Trainer) -> bool:
        loader = validation_loader(trainer)
        return loader is None or copied_loader(trainer, loader, streams=True) is not None

    def load(self, original: Mapping[str, float], calibrated: Mapping[str, float]) -> None:
        """Go on with the metrics of a checkpoint."""
        self.original, self.calibrated = dict(original), dict(calibrated)
