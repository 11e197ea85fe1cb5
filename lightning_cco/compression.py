"""The module of a run, compressed: captured, with quantizers hooked on, and with the ranges of a checkpoint if there is one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_cco.automatic_skips import AutomaticSkips
from lightning_cco.batch_prefetch import copied
from lightning_cco.batches import ForwardFn, capture_module, model_context
from lightning_cco.budget_run import recipe_of
from lightning_cco.early_check import check_rules, unrepeated
from lightning_cco.errors import CCOWarning
from lightning_cco.example_batches import calibrate_on_held
from lightning_cco.graph.hooks import hooks_on, release
from lightning_cco.quantized_model import QuantizedModel
from lightning_cco.run_export import apply_state
from lightning_cco.schedule import calibrate
from lightning_cco.settings import Settings, changed_settings
from lightning_cco.standalone_evaluation import OutsideFit
from lightning_cco.weights_at_start import WeightsAtStart

_OF_THE_RUN = tuple(f"{section}_settings." for section in ("training", "distillation", "monitoring", "budget", "deployment"))
"""Settings that do not change what a trained model computes."""


class Compression:
    """What is known of the compressed module of a run, from its capture on.

    Args:
        settings: The recipe.
        forward_fn: The user's way of a batch through the model; `None`: found by the capture.

    Attributes:
        quantized: The module with quantizers; `None` before the capture.
        forward: How a batch goes through it.
        held: Batches held for measuring, copies.
        validation: The first batches of the validation, copies, to check files on.
        state: The callback's state of a checkpoint that waits for the capture.
        skips: Layers that the run skips automatically.
        outside: Whether weights outside of a training have ranges.
        weights: Whether the weights before the first batch are those that were calibrated.
        rules_are_checked: Whether it was looked whether the rules fit the layers.
        said_of_rules: The warnings that were given of them then, which are not repeated.
    """

    def __init__(self, settings: Settings, forward_fn: ForwardFn | None) -> None:
        self.settings = settings
        self.forward_fn = forward_fn
        self.quantized: QuantizedModel | None = None
        self.forward: ForwardFn | None = None
        self.held: list[Any] = []
        self.validation: list[Any] = []
        self.state: dict[str, Any] | None = None
        self.skips = AutomaticSkips()
        self.outside = OutsideFit()
        self.weights = WeightsAtStart()
        self.rules_are_checked = False
        self.said_of_rules: list[str] = []

    def is_of_another(self, module: pl.LightningModule) -> bool:
        """Whether what is hooked is not this module, or no longer."""
        return self.quantized is not None and (self.quantized.model is not module or not self.quantized.attached)

    def leave(self, state: dict[str, Any] | None) -> None:
        """Take the hooks off, and keep a state for the next capture."""
        assert self.quantized is not None
        self.quantized.remove()
        self.quantized, self.state = None, state

    def release(self, module: pl.LightningModule) -> None:
        """Take somebody else's quantizers off a module."""
        if release(module):
            rank_zero_info(
                "lightning_cco: the model was quantized already, by another callback or quantize(); this callback's recipe takes its place."
            )

    def attach(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> QuantizedModel:
        """Capture the layers from a batch and hook the quantizers on, unless they are; then take over the state that waits.

        Raises:
            CCOError: The module can't be captured, a rule matches no layer, or the state is of another architecture.
        """
        if self.quantized is None:
            self.release(module)
            with model_context(trainer):
                captured, self.forward = capture_module(module, batch, self.forward_fn)
                suggested = list(self.state["skips"]) if self.state else []
                with unrepeated(self.said_of_rules):
                    self.quantized = QuantizedModel(module, captured, recipe_of(self.settings, self.state), suggested)
        if self.state is not None:
            self.take_over(self.state, evaluating=trainer.state.fn is not TrainerFn.FITTING)
        return self.quantized

    def take_over(self, state: Mapping[str, Any], evaluating: bool = False) -> None:
        """Put a checkpoint's ranges in, and say what has changed since.

        A training may go on with other settings on purpose. Metrics of an evaluation are then those of a model that nobody has trained, which is a warning.

        Raises:
            CCOError: The state is of another architecture.
        """
        assert self.quantized is not None
        with torch.inference_mode(False):
            of_layers = apply_state(self.quantized, state, self.settings, self.skips.applied)
        differences = changed_settings(state["settings"], self.quantized.settings.to_dict()) + of_layers
        self.state = None
        planned = [difference for difference in differences if not difference.startswith(_OF_THE_RUN)]
        if evaluating and planned:
            more = f" and {len(planned) - 4} more" if len(planned) > 4 else ""
            warnings.warn(
                f"the model is evaluated with other settings than it was trained with: {'; '.join(planned[:4])}{more}. Give CCOCallback the recipe of "
                "the training (resolved_recipe.yaml in its folder), or use lightning_cco.load_quantized, which takes that of the checkpoint.",
                CCOWarning,
                stacklevel=2,
            )
        for difference in [] if evaluating else differences:
            rank_zero_info(f"Resuming with other settings than the checkpoint's: {difference}.")
        if self.quantized.uncalibrated:
            rank_zero_info(f"Without ranges in the checkpoint, to be calibrated: {', '.join(self.quantized.uncalibrated)}.")

    def calibrate(self, trainer: pl.Trainer) -> None:
        """Find the ranges that are not known, on the batches that are trained on next."""
        assert self.quantized is not None
        if not self.quantized.calibrated or self.quantized.uncalibrated:
            calibrate(trainer, self.quantized, self.settings, self.forward)

    def before_validation_batch(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, number: int, loader: int) -> None:
        """Keep the first batches to check files on; look whether the rules fit the layers. Else as `before_evaluation_batch`.

        Args:
            trainer: The Trainer.
            module: Its module.
            batch: The batch.
            number: Its number.
            loader: Number of the loader.
        """
        if loader == 0 and number == len(self.validation) < self.settings.monitoring_settings.sensitivity_batches:
            with torch.inference_mode(False):
                self.validation.append(copied(batch))
        if trainer.sanity_checking and not self.rules_are_checked and self.quantized is None and self.state is None:
            self.rules_are_checked = True
            self.said_of_rules = check_rules(trainer, module, batch, self.forward_fn, self.settings)
        self.before_evaluation_batch(trainer, module, batch)

    def before_evaluation_batch(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        """Outside of a training: hook the checkpoint's quantizers on before the first batch."""
        if trainer.sanity_checking or trainer.training or trainer.state.fn == "fit":
            return
        if self.state is None:
            if self.quantized is None:
                if hooks_on(module) is None:  # those of another callback quantize it: configure_callbacks gives each run a new one
                    self.outside.warn_of_float(trainer)
            else:
                self._calibrate_outside(trainer)
            return
        if not self.attach(trainer, module, batch).calibrated:
            self.outside.warn_of_float(trainer, "the checkpoint is from before fake-quantization started (training_settings.start_at_step)")
        self.held = self.held or [copied(batch)]
        self._calibrate_outside(trainer)

    def _calibrate_outside(self, trainer: pl.Trainer) -> None:
        """Find ranges for weights that came without, of a checkpoint that has no others or of another model than the one trained."""
        where = self.outside.without_ranges(trainer)
        if where:
            assert self.quantized is not None
            with model_context(trainer):
                calibrate_on_held(self.quantized, self.held, self.forward, where)
