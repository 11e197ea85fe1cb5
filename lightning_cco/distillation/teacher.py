"""The float model that teaches: a copy that no optimizer, checkpoint or hook of ours knows of, and the file that a resumed run has it from."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_cco.errors import CCOError
from lightning_cco.files import write_file
from lightning_cco.graph.modes import switch_training
from lightning_cco.names import printable

SETTING = "distillation_settings.teacher"


def copy_of(model: pl.LightningModule) -> nn.Module:
    """A copy of a model with weights and buffers of its own, in evaluation mode and without gradients. Hooks of ours are inert in it.

    What of the LightningModule is neither module nor tensor, such as the Trainer and data sets, is shared.

    Raises:
        CCOError: Something in it can't be copied.
    """
    memo: dict[int, Any] = {}
    plain = vars(nn.Module())
    for name, value in vars(model).items():
        if name not in plain and not _holds_modules(value):
            memo[id(value)] = value
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # made of parameters, as by the old weight_norm; made anew in each forward
                memo[id(value)] = value.detach().clone()
    try:
        with torch.inference_mode(False):
            teacher = copy.deepcopy(model, memo)
    except Exception as error:
        raise CCOError(
            f"distillation_settings: the float model can't be copied for a teacher: {type(error).__name__}: {printable(str(error), 300)}. copy.deepcopy "
            f"of {type(model).__name__} was expected to work; keep what can't be copied out of its modules."
        ) from error
    for original, copied in zip(model.modules(), teacher.modules(), strict=True):
        forward = vars(copied).get("forward")
        inner = inspect.unwrap(forward) if callable(forward) else None
        if isinstance(inner, MethodType) and inner.__self__ is original and inner.__func__ is type(original).forward:
            del copied.__dict__["forward"]  # compiled for the original
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    for module in teacher.modules():
        if isinstance(module, pl.LightningModule):
            vars(module).update(log=_nothing, log_dict=_nothing)
    switch_training(teacher, False)
    return teacher


def attach(teacher: nn.Module, trainer: pl.Trainer | None) -> None:
    """Let a teacher know the Trainer of the run, or know it no more: forwards read the epoch and the step from it, which `copy.deepcopy` leaves out."""
    for module in teacher.modules():
        if isinstance(module, pl.LightningModule):
            module.trainer = trainer


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _holds_modules(value: Any, deepest: int = 3) -> bool:
    """Whether a value is, or directly holds, what a copy must have of its own: modules, tensors, methods."""
    if isinstance(value, (Tensor, nn.Module, MethodType, partial)):
        return True
    items: Any = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (Sequence, Set)) and not isinstance(value, str) else ()
    )
    return deepest > 0 and any(_holds_modules(item, deepest - 1) for item, _ in zip(items, range(64), strict=False))


def save_weights(teacher: nn.Module, path: Path, mark: str) -> None:
    """Write a teacher's weights, with a mark that tells them from those of other runs.

    Raises:
        OSError: They can't be written.
    """
    buffer = io.BytesIO()
    torch.save({"mark": mark, "state_dict": {name: value.detach().cpu() for name, value in teacher.state_dict().items()}}, buffer)
    write_file(path, buffer.getvalue())


def load_weights(teacher: nn.Module, path: str | Path, mark: str | None = None) -> None:
    """Give a teacher the float weights of a file.

    Args:
        teacher: A copy of the model.
        path: A checkpoint of Lightning's, or a ``state_dict`` saved by `torch.save`.
        mark: The mark that the file must carry; `None` for a file that the user names.

    Raises:
        CCOError: The file is missing, holds other weights or those of a compressed model.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CCOError(f"the teacher's file {path} is not there. {_instead()}") from error
    except Exception as error:
        raise CCOError(
            f"the teacher's file {path} can't be read: {type(error).__name__}: {printable(str(error), 300)} Expected a checkpoint with plain hyperparameters, "
            f"or a state_dict saved by torch.save. {_instead()}"
        ) from error
    if not isinstance(saved, Mapping):
        raise CCOError(f"the teacher's file {path}: expected a checkpoint or a state_dict, got {type(saved).__name__}. {_instead()}")
    if mark is not None and saved.get("mark") != mark:
        raise CCOError(f"the teacher's file {path} is of another run than the checkpoint. {_instead()}")
    callbacks = saved.get("callbacks")
    if isinstance(callbacks, Mapping) and any("CCOCallback" in str(name) for name in callbacks):
        raise CCOError(
            f"the teacher's file {path} is a checkpoint of a compressed training, whose weights are no float model's. {_instead()}"
        )
    weights = saved.get("state_dict", saved)
    try:
        teacher.load_state_dict({name: value for name, value in weights.items() if isinstance(value, Tensor)})
    except Exception as error:
        raise CCOError(
            f"the teacher's file {path} does not fit {type(teacher).__name__}: {printable(str(error), 400)} The float weights of the same model were "
            f"expected. {_instead()}"
        ) from error


def _instead() -> str:
    return f"Write {SETTING}: the path of a checkpoint or state_dict of the float model."
