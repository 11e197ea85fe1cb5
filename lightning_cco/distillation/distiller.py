"""Distillation in a Lightning run: the teacher's life, and how its term gets into each loss before the backward."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_cco.batches import ForwardFn, model_context, on_a_copy
from lightning_cco.distillation.autograd_graph import Use
from lightning_cco.distillation.plain_state import PlainState
from lightning_cco.distillation.recorder import CallOfStudent, StudentRecorder
from lightning_cco.distillation.step_comparison import Key, StepComparison, layers_term, outputs_term, uses_of
from lightning_cco.distillation.teacher import SETTING, attach, copy_of, load_weights, save_weights
from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.graph.compiled import eager
from lightning_cco.graph.modes import switch_training, undisturbed
from lightning_cco.quantization.model import HookedModel
from lightning_cco.sections import DistillationSettings
from lightning_cco.strategies import is_sharded


class Distiller:
    """Lets a model learn from its float weights of the start.

    The loss that a strategy's ``backward`` gets, from Lightning's own loop or from ``manual_backward``, is replaced by
    ``(1 - weight) * loss + weight * term``, before the scaler, the accumulation of gradients and the reducer of DDP have their part in it: one backward.

    Args:
        settings: The recipe's section.

    Attributes:
        teacher: The float model; `None` before a training.
        last: The last term, detached.
    """

    def __init__(self, settings: DistillationSettings) -> None:
        self.settings = settings
        self.teacher: nn.Module | None = None
        self.last: Tensor | None = None
        self._saved: dict[str, str] = {}
        self._trained = False
        self._recorder: StudentRecorder | None = None
        self._uses: dict[tuple[Any, ...], dict[Key, Use]] = {}
        self._eager: AbstractContextManager[None] | None = None
        self._undo: Callable[[], None] | None = None
        self._trainer: pl.Trainer | None = None
        self._student: HookedModel | None = None
        self._twins: dict[int, Tensor] = {}
        self._reached_backward = False

    @property
    def wanted(self) -> bool:
        """Whether the recipe asks for it."""
        return self.settings.weight > 0

    def forget(self) -> None:
        """Another model is trained from here on."""
        self.stop()
        self.teacher, self._saved, self._trained = None, {}, False

    def state_dict(self) -> dict[str, str]:
        """Where a resumed run finds the teacher."""
        return dict(self._saved)

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """The model has weights of a compressed training now; a teacher of another one than that has nothing to say of it."""
        self._trained = True
        if dict(state) != self._saved:
            self.teacher, self._saved = None, dict(state)

    def start(self, trainer: pl.Trainer, quantized: HookedModel, forward: ForwardFn, batch: Any, folder: Path) -> None:
        """Before the first step: get the teacher, try it on a batch, and wait for losses.

        Raises:
            CCOError: The float weights are not to be had, or what the network gives can't be compared with what the teacher gives.
        """
        if not self.wanted:
            return
        self.stop()
        model = quantized.model
        assert isinstance(model, pl.LightningModule)
        if is_sharded(model):
            raise CCOError(
                "distillation_settings.weight: this process holds only parts of the parameters, so the float model can't be copied for a teacher. Write "
                "weight: 0, or train with strategy='ddp'."
            )
        self._obtain(trainer, model, folder)
        assert self.teacher is not None
        self.teacher.to(quantized.device)
        attach(self.teacher, trainer)
        layers = {layer.path for layer in quantized.graph if layer.name in quantized.weights} if self.settings.on == "layers" else set()
        plain = PlainState(model, self.teacher)
        self._recorder = StudentRecorder(
            quantized.runtime.frames, _around(layer.path for layer in quantized.graph), layers, plain, quantized.device
        )
        self._trainer, self._student, self._reached_backward = trainer, quantized, False
        self._twins = {id(mine): theirs for mine, theirs in zip(_tensors_of(model), _tensors_of(self.teacher), strict=True)}
        self._uses.clear()
        self._try(quantized, forward, batch)
        strategy = trainer.strategy
        backward, own = strategy.backward, "backward" in vars(strategy)

        def with_teacher(closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss = self._with_term(closure_loss)
            assert self._recorder is not None
            on, self._recorder.on = self._recorder.on, False  # what a checkpoint runs again is no step
            try:
                return backward(loss, optimizer, *args, **kwargs)
            finally:
                self._recorder.on = on

        def undo() -> None:
            if own:
                strategy.backward = backward  # type: ignore[method-assign]
            else:
                vars(strategy).pop("backward", None)

        strategy.backward = with_teacher  # type: ignore[method-assign]
        self._undo = undo

    def stop(self) -> None:
        """After a training, also an interrupted one: everything is as it was, and the teacher waits on the CPU."""
        self._leave_eager()
        if self._undo is not None:
            self._undo()
            self._undo = None
        if self._recorder is not None:
            self._recorder.detach()
            self._recorder = None
        if self.teacher is not None:
            self.teacher.to("cpu")
            attach(self.teacher, None)
        self._trainer, self._student, self._twins = None, None, {}

    def _obtain(self, trainer: pl.Trainer, model: pl.LightningModule, folder: Path) -> None:
        if self.teacher is not None and self.settings.teacher is None:
            return
        if self.settings.teacher is not None:
            self.teacher = copy_of(model)
            load_weights(self.teacher, self.settings.teacher)
            rank_zero_info(f"Distillation: the teacher has the weights of {self.settings.teacher}.")
            return
        if not self._trained:
            self.teacher = copy_of(model)
            self._keep(trainer, folder)
            return
        if not self._saved:
            raise CCOError(
                "distillation_settings.weight: the run goes on from a checkpoint of a compressed training that does not say where its float weights are, and "
                f"its own are no teacher's. Write {SETTING}: the path of a checkpoint or state_dict of the float model, or weight: 0."
            )
        self.teacher = copy_of(model)
        load_weights(self.teacher, self._saved["path"], self._saved["mark"])
        rank_zero_info(f"Distillation: the teacher has the float weights that the run started from, of {self._saved['path']}.")

    def _keep(self, trainer: pl.Trainer, folder: Path) -> None:
        """Write the weights beside the pictures, so that a resumed run has them."""
        if trainer.fast_dev_run or trainer.barebones:  # type: ignore[attr-defined]
            return
        path = (folder / "teacher.pt").absolute()
        mark: str = trainer.strategy.broadcast(secrets.token_hex(8))
        if trainer.is_global_zero:
            assert self.teacher is not None
            try:
                save_weights(self.teacher, path, mark)
            except OSError as error:
                warnings.warn(
                    f"Distillation: the float weights can't be kept in {path}: {error}. The training goes on; a run that is resumed from its checkpoints will "
                    f"need {SETTING}.",
                    CCOWarning,
                    stacklevel=2,
                )
                return
        self._saved = {"path": str(path), "mark": mark}

    def _try(self, quantized: HookedModel, forward: ForwardFn, batch: Any) -> None:
        """Let student and teacher see a batch in training mode, where nothing is changed by it."""
        assert self._recorder is not None
        assert self._trainer is not None
        with model_context(self._trainer), quantized.disabled(), undisturbed(quantized.model, gradients=True):
            switch_training(quantized.model, True)
            self._recorder.on = True
            try:
                on_a_copy(forward)(quantized.model, batch)
            except Exception:  # such as a batch of one sample under batch norm; the capture has spoken of it
                return
            finally:
                self._recorder.on = False
                calls = self._recorder.take()
            if calls:
                comparison = self._comparison(calls)
                _ = comparison.layer_pairs() if self.settings.on == "layers" else comparison.candidates()

    def _comparison(self, calls: list[CallOfStudent]) -> StepComparison:
        assert self.teacher is not None
        assert self._recorder is not None
        assert self._trainer is not None
        assert self._student is not None
        with self._trainer.precision_plugin.forward_context(), self._student.forked_random():
            return StepComparison(
                self.teacher, self._recorder, calls, self.settings.on == "layers", self._student.capture.needs_gradients, self._twins
            )

    def before_batch(self) -> None:
        """A training batch begins. How the loss takes the outputs is found out in the first one, where compiled code runs eagerly for that."""
        if self._recorder is None:
            return
        self._recorder.clear()
        self._recorder.on = True
        if not self._reached_backward and self._eager is None:
            self._eager = eager()
            self._eager.__enter__()

    def after_batch(self, pl_module: pl.LightningModule) -> None:
        """A training batch has ended.

        Raises:
            CCOError: A step that is optimized by hand had outputs, but no loss was seen.
        """
        if self._recorder is None:
            return
        self._leave_eager()
        self._recorder.on = False
        if self._recorder.calls and not self._reached_backward and not pl_module.automatic_optimization:
            raise CCOError(
                "distillation_settings.weight: training_step optimizes by hand, but never called self.manual_backward(loss), by which distillation is added to "
                "the loss. Write self.manual_backward(loss) instead of loss.backward()."
            )
        if self.last is not None and self._trainer is not None and not self._trainer.barebones:
            pl_module.log("cco/distillation_loss", self.last, on_step=False, on_epoch=True, batch_size=1, rank_zero_only=True)
        self.last = None

    def pause(self) -> None:
        """A validation begins: what it computes is not compared."""
        if self._recorder is not None:
            self._recorder.on = False

    def _leave_eager(self) -> None:
        if self._eager is not None:
            self._eager.__exit__(None, None, None)
            self._eager = None

    def _with_term(self, loss: Tensor) -> Tensor:
        """The loss to go backward from."""
        assert self._recorder is not None
        assert self._trainer is not None
        calls = [call for call in self._recorder.take() if call.output is not None]
        share = self.settings.weight
        if not calls:
            return loss * (1 - share)
        device = loss.device.type
        with torch.enable_grad(), torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else torch.enable_grad():
            comparison = self._comparison(calls)
            term = (
                layers_term(comparison)
                if self.settings.on == "layers"
                else outputs_term(comparison, self._uses_of(loss, comparison), self.settings.temperature)
            )
            self._reached_backward = True
            self._leave_eager()
            self.last = term.detach()
            # Lightning has divided the loss already; a loss of manual_backward is the user's as it is.
            added = share * term / self._trainer.accumulate_grad_batches
            return added.to(loss.dtype) if share == 1 else (1 - share) * loss + added.to(loss.dtype)

    def _uses_of(self, loss: Tensor, comparison: StepComparison) -> dict[Key, Use]:
        known = comparison.kind
        if known not in self._uses:
            self._uses[known] = uses = uses_of(loss, comparison, self.settings)
            words = {
                "classes": "logits, by KL divergence",
                "questions": "logits of yes and no, by KL divergence",
                "values": "values, by the squared error",
            }
            rank_zero_info("Distillation: " + "; ".join(f"{comparison.name_of(key)}: {words[use.kind]}" for key, use in uses.items()) + ".")
        return self._uses[known]


def _around(paths: Any) -> set[str]:
    """Paths and those of all modules around them."""
    found = {""}
    for path in paths:
        parts = path.split(".") if path else []
        found.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return found


def _tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
