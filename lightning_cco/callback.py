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
    training_batches,
)
from lightning_cco.budget.layer_times import LayerTimes, from_plain
from lightning_cco.budget.plan import BudgetPlan
from lightning_cco.budgeted import (
    check_budget,
    is_due,
    lost_of,
    needs_plan,
    plan_budget,
)
from lightning_cco.checkpoints import check_callback_state, local_folder
from lightning_cco.compat.lightning_trainer import logged_step
from lightning_cco.compression import Compression
from lightning_cco.distillation.distiller import Distiller
from lightning_cco.early_check import check_rules
from lightning_cco.epoch_measurement import measure_epoch
from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.export.report import ExportReport
from lightning_cco.export_dir import check_export_dir
from lightning_cco.handover import Handover
from lightning_cco.initial_evaluation import InitialEvaluation
from lightning_cco.level_use import LayerLevels, LevelWatch
from lightning_cco.lookahead import copied, left_over, warn_of_left_over
from lightning_cco.loss_sensitivity import LossSensitivityReport
from lightning_cco.monitoring import Monitor
from lightning_cco.monitoring.epoch import EpochMetrics, EpochResults
from lightning_cco.monitoring.metric_modes import metric_directions
from lightning_cco.monitoring.metrics import monitored_values, numbers
from lightning_cco.monitoring.start import start_monitor
from lightning_cco.outside_fit import OutsideFit
from lightning_cco.quantized_model import QuantizedModel
from lightning_cco.report_page.facts import model_facts
from lightning_cco.schedule import Schedule, check_schedule, stages_in
from lightning_cco.sensitivity import SensitivityReport
from lightning_cco.settings import Settings, load_settings
from lightning_cco.strategies import check_strategy
from lightning_cco.suggestions import Suggestion


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

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> class Module(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        ...     def forward(self, x):
        ...         return self.net(x)
        ...     def training_step(self, batch, batch_idx):
        ...         return self(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), 0.01)
        >>> cco = CCOCallback("w8a8")
        >>> silent = {"enable_model_summary": False, "enable_progress_bar": False, "logger": False, "accelerator": "cpu"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = pl.Trainer(callbacks=[cco], max_steps=2, default_root_dir=folder, enable_checkpointing=False, **silent)
        ...     trainer.fit(Module(), DataLoader(torch.randn(32, 4), batch_size=8))
        >>> cco.quantized
        QuantizedModel(Module, 2 of 3 layers with weights run in INT8 in ort (92 % of the multiplications); calibrated)
    """

    def __init__(self, cfg: Settings | Mapping[str, Any] | str | Path | None = None, forward_fn: ForwardFn | None = None) -> None:
        self.settings = load_settings(cfg)
        self.report: SensitivityReport | None = None
        self.levels: dict[str, LayerLevels] = {}
        self.suggestions: list[Suggestion] = []
        self.before_training = InitialEvaluation()
        self.budget: BudgetPlan | None = None
        self._times: LayerTimes | None = None
        self.losses: LossSensitivityReport | None = None
        self.distiller = Distiller(self.settings.distillation_settings)
        self._level_watch = LevelWatch()
        self.schedule = Schedule(self.settings)
        self._compression = Compression(self.settings, forward_fn)
        self._monitor: Monitor | None = None
        self._outside_fit = OutsideFit()
        self._rules_are_checked = False

    @property
    def quantized(self) -> QuantizedModel | None:
        """The module with its quantizers; `None` before its first batch."""
        return self._compression.quantized

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
        if self._compression.is_of_another(pl_module):
            self._leave(pl_module, stage)
        if stage == "fit":
            check_export_dir(self.settings.deployment_settings.export_dir, self.settings.deployment_settings.target_framework)
            check_budget(self.settings, trainer)
            check_schedule(self.settings)
            self._rules_are_checked = False
            if self.quantized is None:
                self._compression.release(pl_module)

    def _leave(self, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the hooks off the model of an earlier run. Another model is trained from scratch: ranges, skips and metrics of the first say nothing of it."""
        assert self.quantized is not None
        if stage == "fit" and self.quantized.model is not pl_module:
            rank_zero_info("CCOCallback: another model than in the run before; it is captured and calibrated anew.")
            self._compression.leave(None)
            self._compression = Compression(self.settings, self._compression.forward_fn)
            self._monitor, self.report, self.losses, self.budget, self._times, self.suggestions = None, None, None, None, None, []
            self.distiller.forget()
            self.schedule = Schedule(self.settings)
            self.before_training, self._level_watch = InitialEvaluation(), LevelWatch()
        else:
            self._compression.leave(self._compression.state or self.state_dict())

    def _wants_original_metrics(self) -> bool:
        return self.quantized is None and not self.settings.training_settings.skip_initial_evaluation and not self.original_metrics

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the validation before training. Lets it be a whole one where it can't be repeated."""
        if self._wants_original_metrics():
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
        """Called before the first batch. Captures, plans, draws, and calibrates or takes the ranges of a checkpoint over."""
        if self._wants_original_metrics():
            self.before_training.evaluate_original(trainer, self._progress_has_begun(trainer))
        compression = self._compression
        held = compression.held = list(training_batches(trainer, self.settings.monitoring_settings.sensitivity_batches))
        if not held:
            raise CCOError(
                "CCOCallback: the training loader is empty; expected at least one batch to capture the layers and to calibrate on."
            )
        history = self._monitor.state_dict() if self._monitor is not None else (compression.state or {}).get("monitor")
        monitor = self._monitor = start_monitor(trainer, self.settings.monitoring_settings, history)
        quantized = compression.attach(trainer, pl_module, held[0])
        self.schedule.begin(trainer, quantized, compression.skips.applied, self.settings)
        monitor.on_start(quantized.graph, quantized.plan, model_facts(quantized))
        if not self.schedule.waits(trainer, quantized):
            self._find_ranges(trainer, quantized)
        assert compression.forward is not None
        self.distiller.start(trainer, quantized, compression.forward, held[0], monitor.folder.path)

    def _find_ranges(self, trainer: pl.Trainer, quantized: QuantizedModel) -> None:
        """Before the first batch: calibrate, choose the plan of a budget, and validate what the calibration gives."""
        untrained = not quantized.calibrated and trainer.global_step == 0
        self._compression.calibrate(trainer)
        if needs_plan(self.settings, quantized.settings):
            self._plan_budget(trainer)
        if untrained:
            self.before_training.evaluate_calibrated(trainer, self.settings.training_settings, self._progress_has_begun(trainer))
        self._apply_pending_skips(trainer)
        self.schedule.freeze_if_due(trainer, quantized)

    def _plan_budget(self, trainer: pl.Trainer) -> None:
        quantized, forward, held = self.quantized, self._compression.forward, self._compression.held
        assert quantized is not None
        assert forward is not None
        budget = self.settings.budget_settings

        def lost() -> float:
            now = self.before_training.validate(trainer, self._progress_has_begun(trainer))
            return lost_of(str(budget.metric), self.original_metrics, now, metric_directions(trainer, now))

        validate = lost if budget.accuracy_drop is not None else None
        self.budget = plan_budget(trainer, quantized, self.settings, forward, held, validate, self._times)
        self._times = self.budget.times
        self.schedule.freeze_if_due(trainer, quantized)
        if self._monitor is not None:
            self._monitor.on_plan(quantized.plan)
            self._monitor.on_budget(self.budget, logged_step(trainer))

    def _progress_has_begun(self, trainer: pl.Trainer) -> bool:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return trainer.progress_bar_callback in callbacks[: callbacks.index(self)]

    # Training

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before each training batch. Observers record from here on; what its step brings is done: fake-quantization starts, bits are lowered."""
        assert self.quantized is not None
        compression = self._compression
        if self.schedule.before_batch(
            trainer, self.quantized, compression.forward, batch, batch_idx, compression.skips.applied, self.settings
        ):
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
        """Called after each batch. Moves the ranges by what was observed, equally on all ranks, and freezes them at their step."""
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
        compression = self._compression
        assert compression.forward is not None
        if not quantized.calibrated:
            monitor.on_float_epoch(trainer.current_epoch, numbers(trainer.callback_metrics), self.original_metrics)
            return
        measured = measure_epoch(trainer, quantized, compression.forward, compression.held, self.settings, self._level_watch)
        self.report, self.levels, self.suggestions = measured.report, measured.levels, measured.suggestions
        if measured.losses is not None:
            self.losses = measured.losses
            monitor.on_losses(trainer.current_epoch, logged_step(trainer), quantized.plan, self.losses, self.settings)
        if self.settings.global_quantization_settings.automatic_skip_quantization:
            compression.skips.propose([suggestion.name for suggestion in self.suggestions])
        if not trainer.barebones:
            for name, value in monitored_values(self.report, quantized, self.suggestions).items():
                pl_module.log(name, value, on_step=False, on_epoch=True, batch_size=1, rank_zero_only=True)
        metrics = numbers(trainer.callback_metrics)
        directions = metric_directions(trainer, metrics)
        results = EpochResults(
            epoch=trainer.current_epoch,
            step=logged_step(trainer),
            plan=quantized.plan,
            settings=self.settings,
            report=self.report,
            metrics=EpochMetrics(metrics, self.original_metrics, self.calibrated_metrics, directions),
            suggestions=self.suggestions,
            levels=self.levels,
            views=self._level_watch.views,
            facts=model_facts(quantized),
        )
        monitor.on_epoch(results)

    def _apply_pending_skips(self, trainer: pl.Trainer) -> None:
        if not self._compression.skips.apply(self.quantized):
            return
        self._compression.calibrate(trainer)
        assert self.quantized is not None
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
        compression, outside = self._compression, self._outside_fit
        if compression.state is None:
            if self.quantized is None:
                outside.warn_of_float(trainer)
            else:
                compression.calibrate_for(trainer, outside)
            return
        if not compression.attach(trainer, pl_module, batch).calibrated:
            outside.warn_of_float(trainer, "the checkpoint is from before fake-quantization started (training_settings.start_at_step)")
        compression.held = compression.held or [copied(batch)]
        compression.calibrate_for(trainer, outside)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before each validation batch. Outside fit: hooks the checkpoint's quantizers on before the first. Keeps the first ones to check files on."""
        compression = self._compression
        if dataloader_idx == 0 and batch_idx == len(compression.validation) < self.settings.monitoring_settings.sensitivity_batches:
            with torch.inference_mode(False):
                compression.validation.append(copied(batch))
        if trainer.sanity_checking and not self._rules_are_checked and self.quantized is None and compression.state is None:
            self._rules_are_checked = True
            check_rules(trainer, pl_module, batch, compression.forward_fn, self.settings)
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
        if count := left_over(trainer):  # no warning: as an error it would hide what has interrupted the run
            rank_zero_info(
                f"CCOCallback: the run was interrupted before {count} batches of the training loader that the calibration had drawn were trained on. "
                "A stream that gives each sample once has lost them."
            )
        if self.quantized is not None:
            self.quantized.runtime.frames.reset()

    # State

    @override
    def state_dict(self) -> dict[str, Any]:
        """Plan, ranges, original metrics and history as plain data, which a default resume loads with ``weights_only=True``."""
        if self.quantized is None:
            return dict(self._compression.state or {})
        return {
            "quantized": self.quantized.state_dict(),
            "settings": self.quantized.settings.to_dict(),
            "original_metrics": dict(self.original_metrics),
            "calibrated_metrics": dict(self.calibrated_metrics),
            "stages": self.schedule.stages,
            **self._compression.skips.state_dict(),
            "monitor": self._monitor.state_dict() if self._monitor is not None else {},
            "distillation": self.distiller.state_dict(),
            **({"layer_times": self._times.to_plain()} if self._times is not None else {}),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called when a checkpoint is loaded, after the weights. Applied at once to a quantized model, else as soon as there is a batch to capture from."""
        if not state_dict:
            return
        check_callback_state(state_dict)
        self._outside_fit.loaded()
        self._compression.state = state_dict
        self.distiller.load_state_dict(state_dict.get("distillation", {}))
        self._times = from_plain(state_dict["layer_times"], "of the checkpoint") if "layer_times" in state_dict else self._times
        self.before_training.load(state_dict["original_metrics"], state_dict.get("calibrated_metrics", {}))
        self.schedule.stages = stages_in(state_dict)
        self._compression.skips.load_state_dict(state_dict)
        if self.quantized is not None:
            self._compression.take_over(state_dict)

    def export(
        self, path: str | Path, example_args: Sequence[Any] = (), example_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Any:
        """Write the compressed model as an INT8 file and check it in its engine: ``.onnx``, ``.pte`` (ExecuTorch), ``.tflite`` (LiteRT); or a ``.pt2`` program.

        The report goes to the log, to ``FILE.export_report.json`` beside the file, and to TensorBoard.

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
        compression = self._compression
        return Handover(self.quantized, self.settings, compression.held, compression.validation, compression.forward, self.state_key)
