"""From the callback to a file: what an export is given, and the best checkpoint at the end of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_cco.batches import ForwardFn
from lightning_cco.budget_run import recipe_of
from lightning_cco.checkpoints import best_checkpoint, check_callback_state, load_weights, read_checkpoint
from lightning_cco.errors import CCOError
from lightning_cco.example_batches import calibrate_on_held, calls_of, checks_of
from lightning_cco.export.destination import announcement, holds_weights_alone, is_program
from lightning_cco.export.engines import ENGINES, PROGRAMS
from lightning_cco.export.report import ExportReport
from lightning_cco.export_dir import as_before
from lightning_cco.quantized_model import QuantizedModel
from lightning_cco.settings import Settings
from lightning_cco.strategies import is_sharded


def apply_state(quantized: QuantizedModel, state: Mapping[str, Any], settings: Settings, skips: Sequence[str]) -> list[str]:
    """Give a quantized model the plan and the ranges of a checkpoint's state.

    Returns:
        What differs from the checkpoint, in words.

    Raises:
        CCOError: The state is of another architecture.
    """
    recipe = recipe_of(settings, state)
    if tuple(skips) != quantized.plan.suggestions or recipe != quantized.settings:
        quantized.replan(recipe, skips)
    return quantized.load_state_dict(state["quantized"])


@dataclass
class RunExport:
    """What is known when a compressed model is exported.

    Attributes:
        quantized: The model; `None` before anything was compressed.
        settings: The recipe.
        held: The batches held for measuring: examples of the calls that a file holds.
        validation: The first batches of the validation, to check files on.
        forward: How a batch goes through the model.
        state_key: The callback's key in a checkpoint.
    """

    quantized: QuantizedModel | None
    settings: Settings
    held: Sequence[Any]
    validation: Sequence[Any]
    forward: ForwardFn | None
    state_key: str

    def export(self, path: str | Path, args: Sequence[Any], kwargs: Mapping[str, Any] | None, options: dict[str, Any]) -> Any:
        """Write and check a file; see `CCOCallback.export`."""
        quantized = self.compressed()
        source = ""
        rank_zero_info(announcement(path))
        if holds_weights_alone(path):
            return quantized.export(path, **options)
        if not len(args) and not kwargs:
            calls, network = calls_of(quantized, self.held, self.forward)
            args, kwargs = calls[0]
            if network is not None:
                options["network"] = network
            if not is_program(path) or self.settings.deployment_settings.target_framework in PROGRAMS:
                checked, source = checks_of(quantized, calls, self.validation, self.forward)
                options.setdefault("batches", checked)
        written = quantized.export(path, args, kwargs, **options)
        if isinstance(written, ExportReport) and "batches" in options:
            written.batches_from = source
        return written

    def compressed(self) -> QuantizedModel:
        """The model.

        Raises:
            CCOError: There is none yet, or this process has only parts of it.
        """
        if self.quantized is None:
            raise CCOError(
                "CCOCallback.export: nothing is compressed yet. Run trainer.fit(model) first, or trainer.test(model, ckpt_path=...) on a checkpoint. "
                "(A strategy that spawns processes, such as ddp_spawn, leaves the compressed model in them: test its checkpoint on one process.)"
            )
        if is_sharded(self.quantized.model):
            raise CCOError(
                "CCOCallback.export: this process holds only parts of the parameters. Save the checkpoint whole "
                "(ModelParallelStrategy(save_distributed_checkpoint=False)), then export on one process after trainer.test(model, ckpt_path=...)."
            )
        return self.quantized

    def export_best(self, trainer: pl.Trainer, folder: str, export: Callable[[Path], Any]) -> None:
        """Export the best checkpoint, or the last weights if there is none; the model stays as it was.

        Args:
            trainer: The Trainer.
            folder: Where to.
            export: The callback's own export.

        Raises:
            CCOError: The export failed; the message says what is safe, and how to try again.
        """
        best, why = best_checkpoint(trainer)
        ending = ENGINES[self.settings.deployment_settings.target_framework].ending
        path = Path(folder) / f"{type(self.compressed().model).__name__}_int8{ending}"
        try:
            with as_before(self.compressed()):
                if best:
                    self._load(best)
                rank_zero_info(f"Exporting {best or 'the model'} ({why}) to {path}.")
                if trainer.fast_dev_run:  # type: ignore[attr-defined]
                    with TemporaryDirectory() as tried:
                        export(Path(tried) / path.name)
                    rank_zero_info(f"fast_dev_run: the export works; {path} was not written.")
                else:
                    export(path)
        except Exception as error:
            raise CCOError(
                f"deployment_settings.export_dir: the training has ended and its checkpoints are saved ({best or 'none'}), but the export to {path} failed: "
                f"{error} Nothing is lost: to export again, run trainer.test(model, ckpt_path=...) with this callback, then cco.export(path)."
            ) from error

    def _load(self, path: str) -> None:
        """Load a checkpoint's weights with the plan and the ranges that belong to them."""
        quantized, saved = self.compressed(), read_checkpoint(path)
        load_weights(quantized.model, saved)
        state = saved.get("callbacks", {}).get(self.state_key)
        if state:
            check_callback_state(state)
            apply_state(quantized, state, self.settings, state["skips"])
            if not quantized.calibrated:
                calibrate_on_held(quantized, self.held, self.forward, f"{path} is from before fake-quantization started (start_at_step)")
            return
        if not self.held:
            raise CCOError(f"{path} holds no ranges (save_weights_only=True), and the callback keeps no batches to calibrate on.")
        calibrate_on_held(quantized, self.held, self.forward, f"{path} holds no ranges (save_weights_only=True)")
