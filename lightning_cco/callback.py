"""The Trainer's side, and what users hold: when a run captures, calibrates, measures, suggests and draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lightning_cco.batches import ForwardFn
from lightning_cco.budget.plan import BudgetPlan
from lightning_cco.compression_run import CompressionRun
from lightning_cco.distillation.distiller import Distiller
from lightning_cco.errors import CCOError
from lightning_cco.initial_evaluation import InitialEvaluation
from lightning_cco.level_use import LayerLevels
from lightning_cco.loss_sensitivity import LossSensitivityReport
from lightning_cco.quantized_model import QuantizedModel
from lightning_cco.schedule import Schedule
from lightning_cco.sensitivity import SensitivityReport
from lightning_cco.settings import Settings, load_settings
from lightning_cco.strategies import check_trainer
from lightning_cco.suggestions import Suggestion


class CCOCallback(pl.Callback):
    """Compresses any LightningModule to INT8 (or fewer bits) while it trains.

    At the start of ``fit`` the model's layers are captured from one batch, planned, calibrated on ``stats_steps`` batches, and fake-quantized
    from the first step on. At the end of each epoch the Quantization Sensitivity of every layer is measured on the same few batches, drawn,
    logged, and turned into suggestions. The module's parameters, names and code stay as they are, so its checkpoints load into the plain float model.

    Args:
        cfg: The recipe: `Settings`, a mapping, a DictConfig, the path of a YAML file, or the name of a shipped recipe such as ``w8a8``; `None` for the
            defaults.
        forward_fn: ``(pl_module, batch) -> Any``: how to call the model on a batch, for capture, calibration and measurement. By default
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
        self._run = CompressionRun(self, self.settings, forward_fn)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: what a checkpoint holds. The hooks stay on the module of this run."""
        own = {name: value for name, value in self.__dict__.items() if name != "_run"}
        return {**own, "_forward_fn": self._run.forward_fn, "_state": self._run.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin as after a checkpoint was loaded, for tests and predictions; a training begins anew."""
        kept = dict(state)
        forward_fn, of_run = kept.pop("_forward_fn"), kept.pop("_state")
        self.__dict__.update(kept)
        self._run = CompressionRun(self, self.settings, forward_fn)
        self.load_state_dict(of_run)
        self._run.is_copy = True

    @property
    def quantized(self) -> QuantizedModel | None:
        """The module with its quantizers; `None` before its first batch."""
        return self._run.compression.quantized

    @property
    def report(self) -> SensitivityReport | None:
        """The sensitivities that were measured last; `None` before the first epoch has ended."""
        return self._run.measured.report

    @property
    def losses(self) -> LossSensitivityReport | None:
        """The loss sensitivities that were measured last; `None` where the recipe does not ask for them."""
        return self._run.measured.losses

    @property
    def levels(self) -> dict[str, LayerLevels]:
        """Shares of clipped values and of oscillating weights of each layer, as measured last."""
        return self._run.measured.levels

    @property
    def suggestions(self) -> list[Suggestion]:
        """Layers that should be skipped, by the last measurement."""
        return self._run.measured.suggestions

    @property
    def budget(self) -> BudgetPlan | None:
        """The plan that the budget has chosen; `None` without a budget."""
        return self._run.budget

    @property
    def before_training(self) -> InitialEvaluation:
        """The metrics before training."""
        return self._run.before_training

    @property
    def distiller(self) -> Distiller:
        """The distillation from the float model."""
        return self._run.distiller

    @property
    def schedule(self) -> Schedule:
        """The changes at a step or an epoch: start, stages, freezing."""
        return self._run.schedule

    @property
    def original_metrics(self) -> dict[str, float]:
        """Metrics of the float model before training."""
        return self._run.before_training.original

    @property
    def calibrated_metrics(self) -> dict[str, float]:
        """Metrics after the calibration, before any training: those of PTQ."""
        return self._run.before_training.calibrated

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before the run starts. Refuses what can't work; nothing is captured yet, since the layers may not exist."""
        others = [callback for callback in trainer.callbacks if isinstance(callback, CCOCallback)]  # type: ignore[attr-defined]
        if len(others) > 1:
            raise CCOError(
                f"Trainer(callbacks=...): {len(others)} CCOCallbacks were given, but a model can be quantized only once. Keep one of them."
            )
        check_trainer(trainer)
        self._run.prepare(trainer, pl_module, stage)

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the validation before training. Lets it be a whole one where it can't be repeated."""
        self._run.before_sanity_check(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after each validation. Keeps the metrics of those before training; ranges follow again."""
        self.before_training.keep(trainer)
        self._run.evaluations.end(trainer)

    @override
    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after the validation before training. Puts its number of steps back."""
        self.before_training.restore(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the first batch. Captures, plans, draws, and calibrates or takes the ranges of a checkpoint over."""
        self._run.begin(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called at the start of each epoch. Applies the skips that the last measurement suggested, if the recipe says so."""
        self._run.before_epoch(trainer)

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before each training batch. Observers record from here on; what its step brings is done: fake-quantization starts, bits are lowered."""
        self._run.before_batch(trainer, batch, batch_idx)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Called after each batch. Moves the ranges by what was observed, equally on all ranks, and freezes them at their step."""
        self._run.after_batch(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called at the end of each epoch. Measures, suggests, logs and draws; changes nothing, so that what is saved is what was measured."""
        self._run.after_epoch(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after the last batch. The teacher has nothing more to do, and the modes of batch norms are theirs again."""
        self._run.release()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when fit ends. Waits for the pictures; exports the best checkpoint if the recipe says where."""
        self._run.end(trainer, self.export)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Called when a run is interrupted. Forgets the frames of the forward that did not end, and puts the model and the strategy back."""
        self._run.interrupt(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before each validation. Ranges are frozen in it, also where it records gradients (forces)."""
        self._run.evaluations.begin()

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before a test. Ranges are frozen in it."""
        self._run.evaluations.begin()

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before a prediction. Ranges are frozen in it."""
        self._run.evaluations.begin()

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after a test. Ranges follow again."""
        self._run.evaluations.end(trainer)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after a prediction. Ranges follow again."""
        self._run.evaluations.end(trainer)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before each validation batch. Outside fit: hooks the checkpoint's quantizers on before the first. Keeps the first ones to check files on."""
        self._run.compression.before_validation_batch(trainer, pl_module, batch, batch_idx, dataloader_idx)

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before each test batch. Hooks the checkpoint's quantizers on before the first."""
        self._run.compression.before_evaluation_batch(trainer, pl_module, batch)

    @override
    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before each prediction batch. Hooks the checkpoint's quantizers on before the first."""
        self._run.compression.before_evaluation_batch(trainer, pl_module, batch)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Plan, ranges, original metrics and history as plain data, which a default resume loads with ``weights_only=True``."""
        return self._run.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called when a checkpoint is loaded, after the weights. Applied at once to a quantized model, else as soon as there is a batch to capture from."""
        if state_dict:
            self._run.load_state_dict(state_dict)

    def export(
        self, path: str | Path, example_args: Sequence[Any] = (), example_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Any:
        """Write the compressed model as an INT8 file, and check it in its engine.

        The path's ending chooses the format: ``.onnx``; ``.pte`` (ExecuTorch), ``.tflite`` (LiteRT), ``.mlpackage`` (Core ML); ``.pt2`` for a
        `torch.export` program; ``model.safetensors`` for a network of `transformers`. The report is logged, saved as ``FILE.export_report.json`` in the
        folder of the file, and shown in TensorBoard.

        Args:
            path: Where to write.
            example_args: Positional arguments of one forward. By default those of a batch that the callback holds: the file then contains what ``forward``,
                or the training step, computes of it, without losses. It is checked on validation batches, which the calibration has not seen.
            example_kwargs: Keyword arguments of it.
            **options: See `lightning_cco.export.export_onnx`.

        Returns:
            The `ExportReport`; the program for a ``.pt2`` file.

        Raises:
            CCOError: Nothing was compressed yet, or the export fails; see `lightning_cco.export.export_onnx`.
        """
        return self._run.export(path, example_args, example_kwargs, options)
