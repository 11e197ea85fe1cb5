"""What a run does to compress its module: before it, at each batch, at each epoch's end, and in the end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_cco.batch_prefetch import left_over, warn_of_left_over, why_empty, why_no_batch
from lightning_cco.batches import ForwardFn, training_batches
from lightning_cco.budget.layer_times import LayerTimes, from_plain
from lightning_cco.budget.plan import BudgetPlan
from lightning_cco.budget_run import check_budget, is_due, lost_of, needs_plan, plan_budget
from lightning_cco.checkpoints import check_callback_state, local_folder
from lightning_cco.compat.lightning_trainer import logged_step
from lightning_cco.compression import Compression
from lightning_cco.distillation.distiller import Distiller
from lightning_cco.epoch_measurement import EpochMeasurements
from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.evaluations import Evaluations
from lightning_cco.example_input import check_example
from lightning_cco.export.report import ExportReport
from lightning_cco.export_dir import check_export_dir
from lightning_cco.initial_evaluation import InitialEvaluation
from lightning_cco.level_use import warn_of_clipped
from lightning_cco.monitoring import Monitor
from lightning_cco.monitoring.metric_modes import metric_directions
from lightning_cco.monitoring.metrics import numbers
from lightning_cco.monitoring.start import start_monitor
from lightning_cco.quantized_model import QuantizedModel
from lightning_cco.report_page.facts import model_facts
from lightning_cco.run_export import RunExport
from lightning_cco.schedule import Schedule, check_schedule, stages_in
from lightning_cco.settings import Settings


class CompressionRun:
    """The parts of a run, and which of them does something when.

    Args:
        callback: Whose run it is.
        settings: The recipe.
        forward_fn: The user's way of a batch through the model; `None`: found by the capture.

    Attributes:
        forward_fn: That way.
        is_copy: Whether its state is that of another callback's run, whose module this one's need not be.
        compression: The module of the run.
        evaluations: What is done around each validation, test and prediction.
        before_training: The metrics before training.
        measured: What was measured last.
        budget: What the budget has chosen; `None` without one.
        distiller: What learns from the float model.
        schedule: What changes at a step.
    """

    def __init__(self, callback: pl.Callback, settings: Settings, forward_fn: ForwardFn | None) -> None:
        self.settings, self._callback, self.forward_fn, self.is_copy = settings, callback, forward_fn, False
        self.distiller = Distiller(settings.distillation_settings)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.compression = Compression(self.settings, self.forward_fn)
        self.evaluations = Evaluations(self.compression, self.distiller)
        self.before_training = InitialEvaluation()
        self.measured = EpochMeasurements(self.settings)
        self.schedule = Schedule(self.settings)
        self.budget: BudgetPlan | None = None
        self._times: LayerTimes | None = None
        self._monitor: Monitor | None = None

    @property
    def quantized(self) -> QuantizedModel | None:
        """The module with its quantizers; `None` before the capture."""
        return self.compression.quantized

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Refuse what can't work; leave the model of an earlier run."""
        if stage == "fit" and self.is_copy:
            self._begin_anew()
            self.distiller.forget()
        self.is_copy = False
        self.compression.outside.begin(stage, None if self.quantized is None else self.quantized.model, module)
        if self.compression.is_of_another(module):
            self._leave(module, stage)
        if stage == "fit":
            check_export_dir(self.settings.deployment_settings.export_dir, self.settings.deployment_settings.target_framework)
            check_budget(self.settings, trainer)
            check_schedule(self.settings)
            self.compression.rules_are_checked = False
            if self.quantized is None:
                self.compression.release(module)

    def _leave(self, module: pl.LightningModule, stage: str) -> None:
        """Take the hooks off the model of an earlier run. Another model is trained from scratch: ranges, skips and metrics of the first say nothing of it."""
        assert self.quantized is not None
        if stage == "fit" and self.quantized.model is not module:
            rank_zero_info("CCOCallback: another model than in the run before; it is captured and calibrated anew.")
            self.compression.leave(None)
            outside = self.compression.outside
            self._begin_anew()
            self.compression.outside = outside
            self.distiller.forget()
        else:
            self.compression.leave(self.compression.state or self.state_dict())

    def _wants_original_metrics(self) -> bool:
        return self.quantized is None and not self.settings.training_settings.skip_initial_evaluation and not self.before_training.original

    def before_sanity_check(self, trainer: pl.Trainer) -> None:
        """Let it be a whole validation where it can't be repeated."""
        if self._wants_original_metrics():
            self.before_training.lengthen(trainer)

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Capture, plan, draw, and calibrate or take the ranges of a checkpoint over."""
        if self._wants_original_metrics():
            self.before_training.evaluate_original(trainer, self._progress_has_begun(trainer))
        compression = self.compression
        held = compression.held = list(training_batches(trainer, self.settings.monitoring_settings.sensitivity_batches))
        if not held:
            raise CCOError(
                "CCOCallback: the training loader is empty; expected at least one batch to capture the layers and to calibrate on."
                + why_empty(trainer)
            )
        history = self._monitor.state_dict() if self._monitor is not None else (compression.state or {}).get("monitor")
        monitor = self._monitor = start_monitor(trainer, self.settings.monitoring_settings, history)
        if compression.quantized is None:
            check_example(trainer, module, held[0])
        quantized = compression.attach(trainer, module, held[0])
        self.schedule.begin(trainer, quantized, compression.skips.applied, self.settings)
        monitor.on_start(quantized.graph, quantized.plan, model_facts(quantized))
        if not self.schedule.waits(trainer, quantized):
            self._find_ranges(trainer, quantized)
        assert compression.forward is not None
        self.distiller.start(trainer, quantized, compression.forward, held[0], monitor.folder.path)
        compression.weights.note(module)

    def _find_ranges(self, trainer: pl.Trainer, quantized: QuantizedModel) -> None:
        """Before the first batch: calibrate, choose the plan of a budget, and validate what the calibration gives."""
        untrained = not quantized.calibrated and trainer.global_step == 0
        self.compression.calibrate(trainer)
        if needs_plan(self.settings, quantized.settings):
            self._plan_budget(trainer)
        if untrained:
            self.before_training.evaluate_calibrated(trainer, self.settings.training_settings, self._progress_has_begun(trainer))
        self._apply_pending_skips(trainer)
        self.schedule.freeze_if_due(trainer, quantized)

    def _plan_budget(self, trainer: pl.Trainer) -> None:
        quantized, forward, held = self.quantized, self.compression.forward, self.compression.held
        assert quantized is not None
        assert forward is not None
        budget = self.settings.budget_settings

        def lost() -> float:
            now = self.before_training.validate(trainer, self._progress_has_begun(trainer))
            return lost_of(str(budget.metric), self.before_training.original, now, metric_directions(trainer, now))

        validate = lost if budget.accuracy_drop is not None else None
        self.budget = plan_budget(trainer, quantized, self.settings, forward, held, validate, self._times)
        self._times = self.budget.times
        self.schedule.freeze_if_due(trainer, quantized)
        if self._monitor is not None:
            self._monitor.on_plan(quantized.plan)
            self._monitor.on_budget(self.budget, logged_step(trainer))

    def _progress_has_begun(self, trainer: pl.Trainer) -> bool:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return trainer.progress_bar_callback in callbacks[: callbacks.index(self._callback)]

    def before_batch(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        """Do what its step brings: fake-quantization starts, bits are lowered."""
        quantized, compression = self.quantized, self.compression
        assert quantized is not None
        compression.weights.check(quantized.model)
        if self.schedule.before_batch(trainer, quantized, compression.forward, batch, batch_idx, compression.skips.applied, self.settings):
            assert self._monitor is not None
            self._monitor.on_plan(quantized.plan)
        self.distiller.before_batch()

    def before_epoch(self, trainer: pl.Trainer) -> None:
        """Apply the skips that the last measurement suggested, and plan a budget whose epoch has come."""
        self._apply_pending_skips(trainer)
        if is_due(self.settings.budget_settings, trainer.current_epoch):
            self._plan_budget(trainer)

    def after_batch(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Move the ranges by what was observed, equally on all ranks, and freeze them at their step."""
        assert self.quantized is not None
        self.distiller.after_batch(module)
        self.quantized.update_ranges()
        self.schedule.after_batch(trainer, self.quantized)

    def after_epoch(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure, suggest, log and draw; change nothing, so that what is saved is what was measured."""
        warn_of_left_over(trainer)
        quantized, monitor, compression = self.quantized, self._monitor, self.compression
        assert quantized is not None
        assert monitor is not None
        assert compression.forward is not None
        if not quantized.calibrated:
            monitor.on_float_epoch(trainer.current_epoch, numbers(trainer.callback_metrics), self.before_training.original)
            return
        self.measured.measure(trainer, quantized, compression.forward, compression.held)
        if self.settings.global_quantization_settings.automatic_skip_quantization:
            compression.skips.propose([suggestion.name for suggestion in self.measured.suggestions])
        self.measured.show(trainer, module, quantized, monitor, self.before_training)

    def _apply_pending_skips(self, trainer: pl.Trainer) -> None:
        if not self.compression.skips.apply(self.quantized):
            return
        self.compression.calibrate(trainer)
        assert self.quantized is not None
        if self._monitor is not None:
            self._monitor.on_plan(self.quantized.plan)

    def release(self) -> None:
        """The teacher has nothing more to do, and the modes of batch norms are theirs again."""
        self.distiller.stop()
        self.schedule.release()

    def end(self, trainer: pl.Trainer, export: Callable[[Path], Any]) -> None:
        """Wait for the pictures; export the best checkpoint if the recipe says where."""
        if self._monitor is not None:
            self._monitor.finish()
        folder = self.settings.deployment_settings.export_dir
        if self.quantized is None:
            nothing = " and nothing was exported" if folder is not None else ""
            warnings.warn(
                f"trainer.fit: it ended before its first batch ({why_no_batch(trainer)}), so the model was not compressed{nothing}. "
                "Train for at least one batch.",
                CCOWarning,
                stacklevel=2,
            )
            return
        if self.schedule.warn_if_never_started(trainer, self.quantized):
            return
        if trainer.is_global_zero:
            warn_of_clipped(self.measured.levels, self.quantized)
        if folder is not None and trainer.is_global_zero:
            self._run_export().export_best(trainer, local_folder(folder, "deployment_settings.export_dir"), export)

    def interrupt(self, trainer: pl.Trainer) -> None:
        """Forget the frames of the forward that did not end, and restore the model and the strategy."""
        self.release()
        self.evaluations.interrupted()
        if count := left_over(trainer):  # no warning: as an error it would hide what has interrupted the run
            rank_zero_info(
                f"CCOCallback: the run was interrupted before {count} batches of the training loader that the calibration had drawn were trained on. "
                "A stream that gives each sample once has lost them."
            )
        if self.quantized is not None:
            self.quantized.runtime.frames.reset()

    def state_dict(self) -> dict[str, Any]:
        """Plan, ranges, original metrics and history as plain data."""
        if self.quantized is None:
            return dict(self.compression.state or {})
        return {
            "quantized": self.quantized.state_dict(),
            "settings": self.quantized.settings.to_dict(),
            "original_metrics": dict(self.before_training.original),
            "calibrated_metrics": dict(self.before_training.calibrated),
            "stages": self.schedule.stages,
            **self.compression.skips.state_dict(),
            "monitor": self._monitor.state_dict() if self._monitor is not None else {},
            "distillation": self.distiller.state_dict(),
            "layer_times": self._times.to_plain() if self._times is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state over: at once into a quantized model, else as soon as there is a batch to capture from."""
        check_callback_state(state)
        self.compression.outside.loaded()
        self.compression.state = state
        self.distiller.load_state_dict(state.get("distillation", {}))
        self._times = from_plain(state["layer_times"], "of the checkpoint") if state.get("layer_times") is not None else self._times
        self.before_training.load(state["original_metrics"], state.get("calibrated_metrics", {}))
        self.schedule.stages = stages_in(state)
        self.compression.skips.load_state_dict(state)
        if self.quantized is not None:
            self.compression.take_over(state)

    def export(self, path: str | Path, args: Sequence[Any], kwargs: Mapping[str, Any] | None, options: dict[str, Any]) -> Any:
        """Write a file and show what its check has found; see `RunExport.export`."""
        written = self._run_export().export(path, args, kwargs, options)
        if isinstance(written, ExportReport):  # of a checkpoint that was only tested there is no run to show it in: log and JSON alone
            (self._monitor or Monitor(written.beside.parent)).on_export(written)
        return written

    def _run_export(self) -> RunExport:
        compression = self.compression
        return RunExport(
            self.quantized, self.settings, compression.held, compression.validation, compression.forward, self._callback.state_key
        )
