"""The Trainer's side: when to capture, calibrate, measure, suggest and draw."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_cco.batches import (
    ForwardFn,
    capture_module,
    model_context,
    on_a_copy,
    training_batches,
)
from lightning_cco.budget.plan import BudgetPlan
from lightning_cco.budgeted import (
    check_budget,
    is_due,
    loss_of_step,
    lost_of,
    measure_loss_sensitivity,
    measures_loss,
    needs_plan,
    plan_budget,
    recipe_of,
    weight_counts,
)
from lightning_cco.checkpoints import check_callback_state, local_folder
from lightning_cco.distillation.distiller import Distiller
from lightning_cco.early_check import check_rules
from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.export.report import ExportReport
from lightning_cco.export_dir import check_export_dir
from lightning_cco.graph.hooks import release
from lightning_cco.handover import Handover, apply_state
from lightning_cco.held_batches import calibrate_on_held
from lightning_cco.initial_evaluation import InitialEvaluation
from lightning_cco.level_use import LayerLevels, LevelWatch
from lightning_cco.lookahead import copied, warn_of_left_over
from lightning_cco.loss_sensitivity import LossSensitivityReport
from lightning_cco.monitoring import Monitor
from lightning_cco.monitoring.metric_modes import metric_directions
from lightning_cco.monitoring.metrics import monitored_values, numbers
from lightning_cco.monitoring.start import start_monitor
from lightning_cco.outside_fit import OutsideFit
from lightning_cco.quantized_model import QuantizedModel
from lightning_cco.report_page.facts import model_facts
from lightning_cco.schedule import Schedule, calibrate, check_schedule, stages_in
from lightning_cco.sensitivity import SensitivityReport
from lightning_cco.settings import Settings, changed_settings, load_settings
from lightning_cco.strategies import check_strategy
from lightning_cco.suggestions import Suggestion, suggest_skips


class CCOCallback(pl.Callback):
    """Compresses any LightningModule to INT8 (or fewer bits) while it trains.

    At the start of ``fit`` the model's layers are captured from one batch, planned, calibrated on ``stats_steps`` batches, and fake-quantized
    from the first step on. At the end of each epoch the Quantization Sensitivity of every layer is measured on the same few batches, drawn,
    logged, and turned into suggestions. The module's parameters, names and code stay as they are, so its checkpoints load into the plain float model.

    Args:
        cfg: The recipe: `Settings`, a mapping, a DictConfig, the path of a YAML file, or the name of a shipped recipe such as ``w8a8``; `None` for the
            defaults.
        forward_fn: ``(pl_module, batch) -> Any``: how a batch goes through the model's layers, for capture, calibration and measurement. By default
            ``pl_module(...)`` on the batch's first element (or as many as ``forward`` requires, or the keys that it names), and if that does not reach
            every layer with weights, ``training_step`` with nothing logged or optimized.

    Logged each epoch, for ``monitor=`` of other callbacks:

    | name | |
    |---|---|
    | `cco/qs_max` | largest local Quantization Sensitivity of any layer (L2 norm) |
    | `cco/qs_mean` | mean over the layers |
    | `cco/sqnr_min` | smallest signal-to-quantization-noise ratio of any layer, dB |
    | `cco/num_quantized_layers` | number of layers in INT8 |
    | `cco/num_suggested_skips` | number of layers above the threshold |
    | `cco/distillation_loss` | mean distance from the float model, with ``distillation_settings`` |

    Raises:
        CCOError: The recipe is not valid.
    """

    def __init__(self, cfg: Settings | Mapping[str, Any] | str | Path | None = None, forward_fn: ForwardFn | None = None) -> None:
        self.settings = load_settings(cfg)
        self.forward_fn = forward_fn
        self.quantized: QuantizedModel | None = None
        self.report: SensitivityReport | None = None
        self.levels: dict[str, LayerLevels] = {}
        self.suggestions: list[Suggestion] = []
        self.before_training = InitialEvaluation()
        self.budget: BudgetPlan | None = None
        self.losses: LossSensitivityReport | None = None
        self.distiller = Distiller(self.settings.distillation_settings)
        self._level_watch = LevelWatch()
        self.schedule = Schedule(self.settings)
        self._forward: ForwardFn | None = None
        self._monitor: Monitor | None = None
        self._held: list[Any] = []
        self._validation: list[Any] = []
        self._state: dict[str, Any] | None = None
        self._skips: list[str] = []
        self._pending_skips: list[str] = []
        self._outside_fit = OutsideFit()

    @property
    def original_metrics(self) -> dict[str, float]:
        """Metrics of the float model before training."""
        return self.before_training.original

    @property
    def calibrated_metrics(self) -> dict[str, float]:
        """Metrics after the calibration, before any training: what calibration alone gives."""
        return self.before_training.calibrated

    # Set-up

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before the run starts. Refuses what can't work; nothing is captured yet, since the layers may not exist."""
        others = [callback for callback in trainer.callbacks if isinstance(callback, CCOCallback)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise CCOError(
                f"Trainer(callbacks=...): {len(others)} CCOCallbacks were given, but a model can be quantized only once. Keep one of them."
            )
        check_strategy(trainer)
        self._outside_fit.begin(stage, None if self.quantized is None else self.quantized.model, pl_module)
        if self.quantized is not None and (self.quantized.model is not pl_module or not self.quantized.attached):
            self._leave(pl_module, stage)
        if stage == "fit":
            check_export_dir(self.settings.deployment_settings.export_dir, self.settings.deployment_settings.target_framework)
            check_budget(self.settings, trainer)
            check_schedule(self.settings)
            if self.quantized is None:
                self._release(pl_module)

    def _leave(self, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the hooks off the model of an earlier run. Another model is trained from scratch: ranges, skips and metrics of the first say nothing of it."""
        assert self.quantized is not None
        if stage == "fit" and self.quantized.model is not pl_module:
            rank_zero_info("CCOCallback: another model than in the run before; it is captured and calibrated anew.")
            self._state, self._monitor, self.report, self.losses, self.budget = None, None, None, None, None
            self.distiller.forget()
            self.schedule = Schedule(self.settings)
            self.before_training, self._level_watch = InitialEvaluation(), LevelWatch()
            self.suggestions, self._skips, self._pending_skips, self._held, self._validation = [], [], [], [], []
        else:
            self._state = self._state or self.state_dict()
        self.quantized.remove()
        self.quantized = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when fit begins. Lets the sanity check run the whole validation: it gives each metric's original value."""
        wanted = not self.settings.training_settings.skip_initial_evaluation and not self.original_metrics
        if wanted and self.quantized is None:
            self.before_training.lengthen(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after each validation. Keeps the metrics of those before training."""
        self.before_training.keep(trainer)

    @override
    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after the validation before training. Puts its number of steps back."""
        self.before_training.restore(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the first batch. Captures, plans, calibrates (or takes the ranges of a checkpoint over), and draws."""
        self.before_training.restore(trainer)  # where there was nothing to validate
        first = next(training_batches(trainer, 1), None)
        if first is None:
            raise CCOError(
                "CCOCallback: the training loader is empty; expected at least one batch to capture the layers and to calibrate on."
            )
        history = self._monitor.state_dict() if self._monitor is not None else (self._state or {}).get("monitor")
        monitor = self._monitor = start_monitor(trainer, self.settings.monitoring_settings, history)
        self._attach(trainer, pl_module, first)
        assert self.quantized is not None
        quantized = self.quantized
        self._held = list(training_batches(trainer, self.settings.monitoring_settings.sensitivity_batches))
        self.schedule.begin(trainer, quantized, self._skips, self.settings)
        monitor.on_start(quantized.graph, quantized.plan, model_facts(quantized))
        if not self.schedule.waits(trainer, quantized):
            self._find_ranges(trainer, quantized)
        assert self._forward is not None
        self.distiller.start(trainer, quantized, self._forward, self._held[0], monitor.folder.path)

    def _find_ranges(self, trainer: pl.Trainer, quantized: QuantizedModel) -> None:
        """Before the first batch: calibrate, choose the plan of a budget, and validate what the calibration gives."""
        untrained = not quantized.calibrated and trainer.global_step == 0
        if not quantized.calibrated or quantized.uncalibrated:
            calibrate(trainer, quantized, self.settings, self._forward)
        if needs_plan(self.settings, quantized.settings):
            self._plan_budget(trainer)
        if untrained:
            self.before_training.evaluate_calibrated(trainer, self.settings.training_settings, self._progress_has_begun(trainer))
        self._apply_pending_skips(trainer)
        self.schedule.freeze_if_due(trainer, quantized)

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Capture the layers and hook the quantizers on, unless they are."""
        if self.quantized is not None:
            if self._state is not None:
                self._take_over(self._state)
            return
        self._release(pl_module)
        with model_context(trainer):
            captured, self._forward = capture_module(pl_module, batch, self.forward_fn)
            self.quantized = QuantizedModel(pl_module, captured, recipe_of(self.settings, self._state), self._suggestions_in(self._state))
        if self._state is not None:
            self._take_over(self._state)

    def _release(self, pl_module: pl.LightningModule) -> None:
        if release(pl_module):
            rank_zero_info(
                "lightning_cco: the model was quantized already, by another callback or quantize(); this callback's recipe takes its place."
            )

    def _plan_budget(self, trainer: pl.Trainer) -> None:
        assert self.quantized is not None
        assert self._forward is not None
        budget = self.settings.budget_settings

        def lost() -> float:
            now = self.before_training.validate(trainer, self._progress_has_begun(trainer))
            return lost_of(str(budget.metric), self.original_metrics, now, metric_directions(trainer, now))

        validate = lost if budget.accuracy_drop is not None else None
        self.budget = plan_budget(trainer, self.quantized, self.settings, self._forward, self._held, validate)
        self.schedule.freeze_if_due(trainer, self.quantized)
        if self._monitor is not None:
            self._monitor.on_plan(self.quantized.plan)
            self._monitor.on_budget(self.budget, trainer.global_step)

    def _progress_has_begun(self, trainer: pl.Trainer) -> bool:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return trainer.progress_bar_callback in callbacks[: callbacks.index(self)]

    # Training

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before each training batch. Lets the ranges follow it, and does what its step brings: fake-quantization starts, bits are lowered."""
        assert self.quantized is not None
        if self.schedule.before_batch(trainer, self.quantized, self._forward, batch, batch_idx, self._skips, self.settings):
            assert self._monitor is not None
            self._monitor.on_plan(self.quantized.plan)
        self.distiller.before_batch()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before each validation. Ranges are frozen in it, also where it records gradients (forces)."""
        if self.quantized is not None:
            self.quantized.follow_ranges(False)
        self.distiller.pause()

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before a test. Ranges are frozen in it."""
        self.on_validation_start(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before a prediction. Ranges are frozen in it."""
        self.on_validation_start(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called at the start of each epoch. Applies the skips that the last measurement suggested, if the recipe says so."""
        self._apply_pending_skips(trainer)
        if is_due(self.settings.budget_settings, trainer.current_epoch):
            self._plan_budget(trainer)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called after each batch. Lets the ranges follow it, equally on all ranks, and freezes them at their step."""
        assert self.quantized is not None
        self.distiller.after_batch(pl_module)
        self.quantized.update_ranges()
        self.schedule.after_batch(trainer, self.quantized)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called at the end of each epoch. Measures, suggests, logs and draws; changes nothing, so that what is saved is what was measured."""
        warn_of_left_over(trainer)
        quantized, monitor = self.quantized, self._monitor
        assert quantized is not None
        assert monitor is not None
        assert self._forward is not None
        if not quantized.calibrated:
            monitor.on_float_epoch(trainer.current_epoch, numbers(trainer.callback_metrics), self.original_metrics)
            return
        forward = self._forward
        with model_context(trainer):
            self.report = quantized.sensitivity(self._held, on_a_copy(self._forward), self.settings.monitoring_settings.sensitivity_modes)
            self.levels = self._level_watch.measure(quantized, lambda: on_a_copy(forward)(quantized.model, self._held[0]))
        if measures_loss(self.settings):
            loss = loss_of_step(trainer, quantized, self._held[0])
            self.losses = measure_loss_sensitivity(trainer, quantized, self._forward, self._held, loss)
            monitor.on_losses(trainer.current_epoch, trainer.global_step, quantized.plan, self.losses, self.settings)
        self.suggestions = suggest_skips(self.report, quantized.plan, self.settings, self.losses, weight_counts(quantized))
        if self.settings.global_quantization_settings.automatic_skip_quantization:
            self._pending_skips = [suggestion.name for suggestion in self.suggestions]
        if not trainer.barebones:
            for name, value in monitored_values(self.report, quantized, self.suggestions).items():
                pl_module.log(name, value, on_step=False, on_epoch=True, batch_size=1, rank_zero_only=True)
        metrics = numbers(trainer.callback_metrics)
        monitor.on_epoch(
            trainer.current_epoch,
            trainer.global_step,
            quantized.plan,
            self.report,
            self.suggestions,
            self.settings,
            metrics,
            self.original_metrics,
            metric_directions(trainer, metrics),
            self.calibrated_metrics,
            self.levels,
            self._level_watch.views,
            model_facts(quantized),
        )

    def _apply_pending_skips(self, trainer: pl.Trainer) -> None:
        if not self._pending_skips or self.quantized is None:
            return
        self._skips += [name for name in self._pending_skips if name not in self._skips]
        rank_zero_info(f"Automatic Quantization: skipping quantization from now on for: {', '.join(self._pending_skips)}.")
        self._pending_skips = []
        self.quantized.uncalibrated = self.quantized.replan(suggestions=self._skips)
        if self.quantized.uncalibrated:
            calibrate(trainer, self.quantized, self.settings, self._forward)
        if self._monitor is not None:
            self._monitor.on_plan(self.quantized.plan)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after the last batch. The teacher has nothing more to do, and the modes of batch norms are theirs again."""
        self.distiller.stop()
        self.schedule.release()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when fit ends. Waits for the pictures; exports the best checkpoint if the recipe says where."""
        if self._monitor is not None:
            self._monitor.finish()
        folder = self.settings.deployment_settings.export_dir
        if self.quantized is None:
            nothing = " and nothing was exported" if folder is not None else ""
            warnings.warn(
                f"trainer.fit: it ended before its first batch (max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}, "
                f"limit_train_batches={trainer.limit_train_batches}), so the model was not compressed{nothing}. Train for at least one batch.",
                CCOWarning,
                stacklevel=2,
            )
            return
        if self.schedule.warn_if_never_started(trainer, self.quantized):
            return
        if folder is not None and trainer.is_global_zero:
            self._handover().export_best(trainer, local_folder(folder, "deployment_settings.export_dir"), self.export)

    # Evaluation outside fit: the checkpoint's quantizers on the first batch

    def _before_evaluation_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        if trainer.sanity_checking or trainer.training or trainer.state.fn == "fit":
            return
        if self.quantized is not None and self._state is None:
            self._calibrate_for_other_weights(trainer)
            return
        if self._state is None:
            self._outside_fit.warn_of_float(trainer)
            return
        self._attach(trainer, pl_module, batch)
        assert self.quantized is not None
        if not self.quantized.calibrated:
            self._outside_fit.warn_of_float(
                trainer, "the checkpoint is from before fake-quantization started (training_settings.start_at_step)"
            )
        self._held = self._held or [copied(batch)]
        self._calibrate_for_other_weights(trainer)

    def _calibrate_for_other_weights(self, trainer: pl.Trainer) -> None:
        """Find ranges for weights that came without: of a checkpoint that has no others, or of another model than the one trained."""
        where = self._outside_fit.without_ranges(trainer)
        if not where:
            return
        assert self.quantized is not None
        with model_context(trainer):
            calibrate_on_held(self.quantized, self._held, self._forward, where)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before each validation batch. Outside fit: hooks the checkpoint's quantizers on before the first. Keeps the first ones to check files on."""
        if dataloader_idx == 0 and batch_idx == len(self._validation) < self.settings.monitoring_settings.sensitivity_batches:
            with torch.inference_mode(False):
                self._validation.append(copied(batch))
        if trainer.sanity_checking and batch_idx == dataloader_idx == 0 and self.quantized is None and self._state is None:
            check_rules(trainer, pl_module, batch, self.forward_fn, self.settings)
        self._before_evaluation_batch(trainer, pl_module, batch)

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before each test batch. Hooks the checkpoint's quantizers on before the first."""
        self._before_evaluation_batch(trainer, pl_module, batch)

    @override
    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before each prediction batch. Hooks the checkpoint's quantizers on before the first."""
        self._before_evaluation_batch(trainer, pl_module, batch)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Called when a run is interrupted. Forgets the frames of the forward that did not end, and puts the model and the strategy back."""
        self.distiller.stop()
        self.schedule.release()
        if self.quantized is not None:
            self.quantized.runtime.frames.reset()

    # State

    @override
    def state_dict(self) -> dict[str, Any]:
        """Plan, ranges, original metrics and history as plain data, which a default resume loads with ``weights_only=True``."""
        if self.quantized is None:
            return dict(self._state or {})
        return {
            "quantized": self.quantized.state_dict(),
            "settings": self.quantized.settings.to_dict(),
            "original_metrics": dict(self.original_metrics),
            "calibrated_metrics": dict(self.calibrated_metrics),
            "skips": list(self._skips),
            "stages": self.schedule.stages,
            "pending_skips": list(self._pending_skips),
            "monitor": self._monitor.state_dict() if self._monitor is not None else {},
            "distillation": self.distiller.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called when a checkpoint is loaded, after the weights. Applied at once to a quantized model, else as soon as there is a batch to capture from."""
        if not state_dict:
            return
        check_callback_state(state_dict)
        self._outside_fit.loaded()
        self._state = state_dict
        self.distiller.load_state_dict(state_dict.get("distillation", {}))
        self.before_training.load(state_dict["original_metrics"], state_dict.get("calibrated_metrics", {}))
        self._skips = list(state_dict["skips"])
        self.schedule.stages = stages_in(state_dict)
        self._pending_skips = list(state_dict["pending_skips"])
        if self.quantized is not None:
            self._take_over(state_dict)

    def export(
        self, path: str | Path, example_args: Sequence[Any] = (), example_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Any:
        """Write the compressed model as an INT8 file and check it in its engine: ``.onnx``, ``.pte`` (ExecuTorch), ``.tflite`` (LiteRT); or a ``.pt2`` program.

        The report goes to the log, to ``export_report.json`` beside the file, and to TensorBoard.

        Args:
            path: Where to write.
            example_args: Positional arguments of one forward; by default those of a held batch: what the file then holds is what ``forward``, or the
                training step, makes of it, without losses; it is checked on batches of the validation, which the calibration has not seen.
            example_kwargs: Keyword arguments of it.
            **options: See `lightning_cco.export.export_onnx`.

        Returns:
            The `ExportReport`; the program for a ``.pt2`` file.

        Raises:
            CCOError: Nothing was compressed yet, or the export fails; see `lightning_cco.export.export_onnx`.
        """
        written = self._handover().export(path, example_args, example_kwargs, options)
        if isinstance(written, ExportReport) and self._monitor is not None:
            self._monitor.on_export(written)
        return written

    def _handover(self) -> Handover:
        return Handover(self.quantized, self.settings, self._held, self._validation, self._forward, self.state_key)

    def _suggestions_in(self, state: Mapping[str, Any] | None) -> list[str]:
        return list(state["skips"]) if state else []

    def _take_over(self, state: Mapping[str, Any]) -> None:
        """Put a checkpoint's ranges in and say what has changed since."""
        assert self.quantized is not None
        with torch.inference_mode(False):
            differences = apply_state(self.quantized, state, self.settings, self._skips)
        differences += changed_settings(state["settings"], self.quantized.settings.to_dict())
        self._state = None
        for difference in differences:
            rank_zero_info(f"Resuming with other settings than the checkpoint's: {difference}.")
        if self.quantized.uncalibrated:
            rank_zero_info(f"Without ranges in the checkpoint, to be calibrated: {', '.join(self.quantized.uncalibrated)}.")
