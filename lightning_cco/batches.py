"""How one batch goes through a LightningModule, and where the batches for calibration come from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_cco.batch_prefetch import copied, hooks_undone, upcoming_batches
from lightning_cco.compat.lightning_trainer import batch_to_device, configured_optimizers
from lightning_cco.errors import CCOError
from lightning_cco.graph.capture import capture
from lightning_cco.graph.capture_coverage import frozen_modules
from lightning_cco.graph.captured import Capture
from lightning_cco.graph.compiled import eager
from lightning_cco.graph.snapshot import Snapshot
from lightning_cco.names import is_within, list_names, printable
from lightning_cco.random_numbers import isolated_random

ForwardFn = Callable[[Any, Any], Any]
"""``(pl_module, batch) -> Any``: runs the model's layers on a batch."""
_LONGEST = 400  # characters of a reason in the log


def forward_through_model(module: pl.LightningModule, batch: Any) -> Any:
    """Call ``module(...)`` on what a batch holds for it; see `forward_arguments`."""
    args, kwargs = forward_arguments(module, batch)
    with _unlogged(module):
        return module(*args, **kwargs)


def forward_arguments(module: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``forward`` in a batch.

    A mapping gives keyword arguments (those that ``forward`` names), a tensor itself; of a tuple or list as many of the first elements are
    given as ``forward`` requires arguments.

    Raises:
        CCOError: The batch does not hold what ``forward`` requires.
    """
    signature = list(inspect.signature(type(module).forward).parameters.values())[1:]  # without self, whatever it is called
    parameters = [p for p in signature if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any_keyword = any(p.kind is p.VAR_KEYWORD for p in signature)
    required = [p.name for p in parameters if p.default is p.empty]
    if isinstance(batch, Mapping):
        names = [p.name for p in parameters]
        if len(required) == 1 and required[0] not in batch and not takes_any_keyword:
            return (batch,), {}  # a forward that takes the mapping itself
        missing = [name for name in required if name not in batch]
        if missing:
            raise _mismatch(module, f"arguments {required}", f"a mapping with the keys {list(batch)}", missing)
        return (), {key: value for key, value in batch.items() if takes_any_keyword or key in names}
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise _mismatch(module, f"arguments {required}", "an empty batch", required)
        count = max(1, len(required))
        if count > 1 and len(batch) <= count and isinstance(batch[0], (tuple, list)) and len(batch[0]) >= count:
            batch = batch[0]
        if isinstance(batch[0], Mapping) and all(name in batch[0] for name in required):
            return forward_arguments(module, batch[0])
        if len(batch) < count:
            raise _mismatch(module, f"arguments {required}", f"a {type(batch).__name__} of {len(batch)}", required[len(batch) :])
        return tuple(batch[:count]), {}
    if len(required) > 1:
        raise _mismatch(module, f"arguments {required}", f"one {type(batch).__name__}", required[1:])
    return (batch,), {}


def _mismatch(module: nn.Module, expected: str, came: str, missing: list[str]) -> CCOError:
    return CCOError(
        f"{type(module).__name__}.forward expects {expected}, but the batch is {came}: nothing for {missing}. "
        "Say how a batch goes through the model: CCOCallback(cfg, forward_fn=lambda module, batch: module(...))."
    )


def rehearsed(forward_fn: ForwardFn) -> ForwardFn:
    """The user's way of a batch through the model, without consequences: it may call a step."""

    def way(module: pl.LightningModule, batch: Any) -> Any:
        with _rehearsing(module):
            return forward_fn(module, batch)

    return way


def on_a_copy(forward: ForwardFn) -> ForwardFn:
    """The same way of a batch through the model, but on a copy: a step may write to its batch, which is used again."""
    return lambda module, batch: forward(module, copied(batch))


def overrides_forward(module: pl.LightningModule) -> bool:
    """Whether the module has a ``forward`` of its own."""
    return type(module).forward not in (pl.LightningModule.forward, nn.Module.forward)


def forward_through_step(module: pl.LightningModule, batch: Any) -> Any:
    """Run the module's ``training_step``, or its ``validation_step`` if it has none, for the layers that it calls: nothing is logged or optimized.

    Raises:
        CCOError: It has neither.
    """
    with _rehearsing(module):
        for name in ("training_step", "validation_step"):
            if getattr(type(module), name) is not getattr(pl.LightningModule, name):
                step = getattr(module, name)
                return step(batch, 0) if len(inspect.signature(step).parameters) > 1 else step(batch)
    raise CCOError(
        f"{type(module).__name__} has neither a forward nor a step of its own. Define one, or pass CCOCallback(cfg, forward_fn=lambda module, batch: ...)."
    )


def capture_module(module: pl.LightningModule, batch: Any, forward_fn: ForwardFn | None = None) -> tuple[Capture, ForwardFn]:
    """Capture through ``forward``, or through the step if that reaches more of the parameters.

    What is captured is the network: augmentations before it, losses and metrics after it are no layers (`graph.network`).

    Args:
        module: The module.
        batch: A batch on its device.
        forward_fn: The user's own way; then no other is tried.

    Returns:
        What was captured, and the way of a batch that did it.

    Raises:
        CCOError: The forward fails on the batch.
    """
    captured, way = _captured(module, batch, forward_fn)
    if captured.left_out:
        rank_zero_info(f"Left in float, since only the loss is computed from it: {', '.join(captured.left_out)}.")
    return captured, way


def _captured(module: pl.LightningModule, batch: Any, forward_fn: ForwardFn | None) -> tuple[Capture, ForwardFn]:
    if forward_fn is not None:
        way = rehearsed(forward_fn)
        return capture(module, lambda: way(module, copied(batch))), way
    found: Capture | None = None
    problem: CCOError | None = None
    if overrides_forward(module):
        try:
            found = capture(module, lambda: forward_through_model(module, copied(batch)))
        except CCOError as error:
            problem = error
        if found is not None and not _unreached(module, found):
            _say_left_out(module, found)
            return found, forward_through_model
    try:
        through_step = capture(module, lambda: forward_through_step(module, copied(batch)))
    except CCOError:
        if found is not None:
            return found, forward_through_model
        if problem is None:
            raise
        raise problem from problem.__cause__  # the model's own error, not that of the second try
    if found is None or len(_unreached(module, through_step)) < len(_unreached(module, found)):
        if found is not None:
            _say_step(f"`forward` does not reach {list_names(sorted(_unreached(module, found) - _unreached(module, through_step)))}.")
        elif problem is not None:
            _say_step(str(problem))
        return through_step, forward_through_step
    return found, forward_through_model


def _say_step(why: str) -> None:
    """Log that layers and inputs are not those of ``forward``, which the module has: those who load or export it call it differently."""
    rank_zero_info(f"The layers are those that the training step calls, and an exported file takes its inputs: {printable(why, _LONGEST)}")


def _unreached(module: pl.LightningModule, captured: Capture) -> set[str]:
    """Parameters that no captured layer reads; not those of frozen modules beside trained ones, such as a teacher."""
    read = {name for layer in captured.graph for name in layer.parameters}
    frozen = frozen_modules(module)
    return {name for name, _ in module.named_parameters() if name not in read and not is_within(name, frozen)}


def _say_left_out(module: pl.LightningModule, captured: Capture) -> None:
    """Log the frozen modules that ``forward`` does not run."""
    read = {name for layer in captured.graph for name in layer.parameters}
    left = [path for path in frozen_modules(module) if not any(is_within(name, [path]) for name in read)]
    if left:
        rank_zero_info(f"Left in float, since they are frozen and `forward` does not run them: {', '.join(left)}.")


class _NoOptimizer:
    """Stands in for an optimizer while a step is rehearsed."""

    param_groups: tuple[dict[str, Any], ...] = ({"lr": 0.0},)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: nullcontext() if name == "toggle_model" else None


def _number_of_optimizers(module: pl.LightningModule) -> int:
    """How many optimizers ``self.optimizers()`` gives in the step. Outside of fit there are none yet, so they are configured for a moment."""
    if module.trainer.optimizers:
        return len(module.trainer.optimizers)
    try:
        return max(1, len(configured_optimizers(module)))
    except Exception:  # it may need what only a fit has, such as the number of steps
        return 1


@contextmanager
def _rehearsing(module: pl.LightningModule) -> Iterator[None]:
    """Let a step run without consequences: no logging, no optimizer step, and whatever it writes to is put back, parameters too."""
    stand_ins = [_NoOptimizer() for _ in range(_number_of_optimizers(module))]
    replaced: dict[str, Any] = dict.fromkeys(("manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients"), _nothing)
    replaced["optimizers"] = lambda *args, **kwargs: stand_ins[0] if len(stand_ins) == 1 else stand_ins
    replaced["lr_schedulers"] = lambda *args, **kwargs: _NoOptimizer()
    around = Snapshot.around(module)
    if around is not None:
        around.keep_parameters()
    with nullcontext() if around is not None else Snapshot(module, parameters=True), _unlogged(module, replaced):
        yield


@contextmanager
def _unlogged(module: pl.LightningModule, replaced: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Let code of the module run with nothing logged, by ``self.log`` or by the loggers themselves.

    Args:
        module: The module.
        replaced: Further methods of it that are something else meanwhile.
    """
    replaced = {**dict.fromkeys(("log", "log_dict"), _nothing), **(replaced or {})}
    own = {name: module.__dict__[name] for name in replaced if name in module.__dict__}
    trainer = _trainer_of(module)
    loggers = [] if trainer is None else trainer.loggers
    module.__dict__.update(replaced)
    if trainer is not None:
        trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        if trainer is not None:
            trainer.loggers = loggers
        for name in replaced:
            module.__dict__.pop(name, None)
        module.__dict__.update(own)


def _trainer_of(module: pl.LightningModule) -> pl.Trainer | None:
    try:
        trainer = module.trainer
    except RuntimeError:  # it has none yet
        return None
    return trainer if isinstance(trainer, pl.Trainer) else None  # Fabric has a stand-in


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


@contextmanager
def model_context(trainer: pl.Trainer) -> Iterator[None]:
    """The Trainer's precision, without compiled code and without inference mode, whose tensors would spoil a later training."""
    with trainer.precision_plugin.forward_context(), torch.inference_mode(False), torch.no_grad(), eager():
        yield


def to_device(trainer: pl.Trainer, batch: Any) -> Any:
    """Convert and move a batch as the training loop does."""
    return batch_to_device(trainer, trainer.precision_plugin.convert_input(batch))


def training_batches(trainer: pl.Trainer, count: int, begun: int | None = None) -> Iterator[Any]:
    """The batches that are trained on next, on the Trainer's device: copies, which the training still gets as they are; see `upcoming_batches`.

    Hooks on the way to the device may draw random numbers, and count; those of the training stay as they are.
    """
    batches = upcoming_batches(trainer, count, begun)  # drawn here and now, not inside of whatever context the caller then opens

    def moved() -> Iterator[Any]:
        for number, batch in enumerate(batches):
            with isolated_random(), hooks_undone(trainer):
                torch.manual_seed(number)
                batch = to_device(trainer, batch)
            yield batch

    return moved()
