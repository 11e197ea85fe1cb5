"""What changes at a step of the training: fake-quantization starts, bits are lowered, ranges and batch norms are frozen.

Each change comes before the first batch whose global step, or epoch, is the one that the recipe says. What needs ranges then is calibrated on that batch and on
those that are trained on next, which the training still gets.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_cco.batch_norms import BatchNorms
from lightning_cco.batch_prefetch import copied
from lightning_cco.batches import ForwardFn, model_context, training_batches
from lightning_cco.budget.plan import goal_of
from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.learned_training import check_learned_scales, follow_learning_rate
from lightning_cco.optimizer_steps import OptimizerSteps
from lightning_cco.progress import with_progress
from lightning_cco.quantized_model import QuantizedModel
from lightning_cco.settings import BitsStage, Settings, load_settings


def check_schedule(settings: Settings) -> None:
    """Say before a training what does not go together.

    Raises:
        CCOError: A budget is chosen from calibrated layers before the first step, and says their bits.
    """
    training = settings.training_settings
    later = "stages" if training.stages else "start_at_step" if training.start_at_step else ""
    if later and (goal := goal_of(settings.budget_settings)) is not None:
        raise CCOError(
            f"training_settings.{later}: budget_settings.{goal[0]} chooses each layer's bits before the first step, so they can't change later. "
            "Keep one of the two."
        )


def staged(settings: Settings, stages: int) -> Settings:
    """A recipe with the bits that hold once so many of its stages have begun; as it is, if none has."""
    begun = settings.training_settings.stages[:stages]
    if not begun:
        return settings
    changed = load_settings(settings)
    general = changed.global_quantization_settings
    for stage in begun:
        general.weights_num_bits = stage.weights_num_bits or general.weights_num_bits
        general.activations_num_bits = stage.activations_num_bits or general.activations_num_bits
    return changed


def stages_in(state: Mapping[str, Any] | None) -> int:
    """How many stages had begun when a state of the callback was saved."""
    return int((state or {}).get("stages", 0))


def calibrate(
    trainer: pl.Trainer, quantized: QuantizedModel, settings: Settings, forward: ForwardFn | None, batches: Iterable[Any] | None = None
) -> None:
    """Find the ranges that are not known, on the batches that are trained on next.

    Args:
        trainer: The Trainer.
        quantized: The module, hooked.
        settings: The recipe.
        forward: How a batch goes through the model.
        batches: These batches; `None`: those that the loop has not begun with yet.
    """
    steps = max(1, settings.training_settings.stats_steps)
    only = quantized.uncalibrated if quantized.calibrated else None
    total = int(min(steps, trainer.num_training_batches))
    rank_zero_info(f"Collecting statistics from the model for at most {total} steps.")
    batches = training_batches(trainer, steps) if batches is None else batches
    with model_context(trainer):
        count = quantized.calibrate(with_progress(trainer, batches, total), forward, only)
    quantized.uncalibrated = []
    fewer = f" (stats_steps is {steps}; the loader gave no more)" if count < steps else ""
    rank_zero_info(f"Done collecting statistics: {count} batches{fewer}.")


class Schedule:
    """Follows the steps of a training.

    Args:
        settings: The recipe.

    Attributes:
        stages: How many of the recipe's stages have begun.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._training = settings.training_settings
        self._batch_norms = BatchNorms()
        self._steps = OptimizerSteps()
        self.stages = 0

    def waits(self, trainer: pl.Trainer, quantized: QuantizedModel) -> bool:
        """Whether the model is still trained in float."""
        start = self._training.start_at_step
        return start is not None and trainer.global_step < start and not quantized.calibrated

    def begin(self, trainer: pl.Trainer, quantized: QuantizedModel, skips: Sequence[str], recipe: Settings) -> None:
        """Before the first batch: take the bits of this step, and say what is to come.

        Args:
            trainer: The Trainer.
            quantized: The module, hooked.
            skips: Layers skipped because of their sensitivity.
            recipe: The recipe before any stage.

        Raises:
            CCOError: A callback monitors what is measured once fake-quantization has started, before that.
        """
        check_learned_scales(self._settings, trainer)
        self._steps.watch(trainer.optimizers, quantized)
        if self._due(trainer) > self.stages:
            self._enter(trainer, quantized, skips, recipe)
        if self.waits(trainer, quantized):
            rank_zero_info(f"Fake-quantization starts at step {self._training.start_at_step}; until then the model trains in float.")
            self._check_monitored(trainer)
        if self._training.start_at_step is not None or self._training.stages:
            self._warn_of_what_never_comes(trainer, quantized)

    def before_batch(
        self,
        trainer: pl.Trainer,
        quantized: QuantizedModel,
        forward: ForwardFn | None,
        batch: Any,
        batch_idx: int,
        skips: Sequence[str],
        recipe: Settings,
    ) -> bool:
        """Before a training batch: do what its step or its epoch brings. Returns whether the plan that runs has changed.

        Args:
            trainer: The Trainer.
            quantized: The module, hooked.
            forward: How a batch goes through the model.
            batch: The batch, on the device.
            batch_idx: Its number in the epoch.
            skips: Layers skipped because of their sensitivity.
            recipe: The recipe before any stage.
        """
        quantized.follow_ranges(True)
        follow_learning_rate(self._settings, trainer, quantized)
        freeze = self._training.freeze_batch_norm_at_step
        if freeze is not None and trainer.global_step >= freeze and (count := self._batch_norms.freeze(quantized.model)):
            rank_zero_info(f"The statistics of {count} batch norms are frozen from step {trainer.global_step} on.")
        starts = not quantized.calibrated and not self.waits(trainer, quantized)
        if not starts and self._due(trainer) <= self.stages:
            return False
        if self._due(trainer) > self.stages:
            self._enter(trainer, quantized, skips, recipe)
        if starts:
            rank_zero_info(f"Fake-quantization starts at step {trainer.global_step}.")
        if starts or (quantized.calibrated and quantized.uncalibrated):
            own = [] if batch is None else [copied(batch)]  # of a step that draws its batches itself
            more = training_batches(trainer, max(1, self._training.stats_steps) - len(own), begun=batch_idx + 1)
            calibrate(trainer, quantized, self._settings, forward, chain(own, more))
        if self._freezes(trainer):
            quantized.freeze_ranges()
        return True

    def after_batch(self, trainer: pl.Trainer, quantized: QuantizedModel) -> None:
        """After a training batch: freeze the ranges, if it is time."""
        if not quantized.frozen and quantized.calibrated and self._freezes(trainer):
            quantized.freeze_ranges()
            rank_zero_info(f"Activation ranges are frozen from step {trainer.global_step} on.")

    def freeze_if_due(self, trainer: pl.Trainer, quantized: QuantizedModel) -> None:
        """Freeze the ranges that a calibration has found, if they are frozen at this step."""
        if self._freezes(trainer):
            quantized.freeze_ranges()

    def release(self) -> None:
        """The training is over: batch norms have their modes again, and optimizers are left."""
        self._steps.release()
        self._batch_norms.release()

    def warn_if_never_started(self, trainer: pl.Trainer, quantized: QuantizedModel) -> bool:
        """After a training: whether it ended before fake-quantization started, which a warning then says."""
        if quantized.calibrated:
            return False
        warnings.warn(
            f"training_settings.start_at_step is {self._training.start_at_step}, but the training ended at step {trainer.global_step}: the model was "
            "trained in float and is not compressed, and nothing was exported. Write a smaller step, or train for longer.",
            CCOWarning,
            stacklevel=3,
        )
        return True

    def _freezes(self, trainer: pl.Trainer) -> bool:
        freeze = self._training.freeze_ranges_at_step
        return freeze is not None and trainer.global_step >= freeze

    def _due(self, trainer: pl.Trainer) -> int:
        """How many stages have begun at this step; as many as an earlier training came to, if that was further."""
        stages = self._training.stages
        count = min(self.stages, len(stages))
        while count < len(stages) and _has_come(stages[count], trainer):
            count += 1
        return count

    def _enter(self, trainer: pl.Trainer, quantized: QuantizedModel, skips: Sequence[str], recipe: Settings) -> None:
        before, begun = _bits(quantized), self.stages
        self.stages = self._due(trainer)
        changed = staged(recipe, self.stages)
        quantized.uncalibrated = [*quantized.uncalibrated, *quantized.replan(changed, skips)]
        for key, bits in _bits(quantized).items():
            if bits == before[key] and any(getattr(stage, key) is not None for stage in self._training.stages[begun : self.stages]):
                _warn_of_no_effect(self.stages - 1, key, bits)
        general = changed.global_quantization_settings
        rank_zero_info(
            f"Stage {self.stages} of {len(self._training.stages)} begins at step {trainer.global_step} (epoch {trainer.current_epoch}): weights of "
            f"{general.weights_num_bits} bits, activations of {general.activations_num_bits}."
        )

    def _check_monitored(self, trainer: pl.Trainer) -> None:
        steps = trainer.num_training_batches // max(1, trainer.accumulate_grad_batches) if trainer.num_training_batches < 10**12 else 0
        if not steps or trainer.global_step + steps > (self._training.start_at_step or 0):
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitored = str(getattr(callback, "monitor", "") or "")
            if monitored.startswith("cco/"):
                raise CCOError(
                    f"training_settings.start_at_step is {self._training.start_at_step}, so '{monitored}', which {type(callback).__name__} monitors, is not "
                    f"there at the end of the first epoch, after {steps} steps. Monitor a metric that the module logs, or start in the first epoch."
                )

    def _warn_of_what_never_comes(self, trainer: pl.Trainer, quantized: QuantizedModel) -> None:
        """Say before a training what lies after its last step."""
        model = quantized.model
        assert isinstance(model, pl.LightningModule)
        last = trainer.estimated_stepping_batches if model.automatic_optimization else -1
        last = last if last >= 0 else float("inf")  # of loaders whose length is not known
        if trainer.max_steps >= 0:
            last = min(last, trainer.max_steps)
        late = [
            f"stages[{n}].at_step: {s.at_step}" for n, s in enumerate(self._training.stages) if s.at_step is not None and s.at_step >= last
        ]
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            epochs = trainer.max_epochs
            late += [
                f"stages[{n}].at_epoch: {s.at_epoch}"
                for n, s in enumerate(self._training.stages)
                if s.at_epoch is not None and s.at_epoch >= epochs
            ]
        if self._training.start_at_step is not None and self._training.start_at_step >= last:
            late.insert(0, f"start_at_step: {self._training.start_at_step}")
        if late:
            warnings.warn(
                f"training_settings.{', '.join(late)}: the training ends before ({last} steps, {trainer.max_epochs} epochs), so it never comes to that.",
                CCOWarning,
                stacklevel=3,
            )


def _has_come(stage: BitsStage, trainer: pl.Trainer) -> bool:
    if stage.at_epoch is not None:
        return trainer.current_epoch >= stage.at_epoch
    return trainer.global_step >= (stage.at_step or 0)


def _bits(quantized: QuantizedModel) -> dict[str, dict[str, int]]:
    """The bits of what is rounded, by the key of a stage that sets them."""
    return {
        "weights_num_bits": {layer: quantizers[0].num_bits for layer, quantizers in quantized.weights.items()},
        "activations_num_bits": {str(key): quantizer.num_bits for key, quantizer in quantized.activations.items()},
    }


def _warn_of_no_effect(number: int, key: str, bits: Mapping[str, int]) -> None:
    what = key.partition("_")[0]
    why = (
        f"each of the {len(bits)} rounded {what} had these bits before, or has bits of its own (a rule of layer_settings, a layer in which few bits cost most)"
        if bits
        else f"no {what} are rounded (weight_only: true, skips)"
    )
    warnings.warn(f"training_settings.stages[{number}].{key} changes nothing: {why}. Leave it out.", CCOWarning, stacklevel=3)
