"""A module's ``example_input_array``, from which it is captured where there are no data: what it holds, and whether ``forward`` takes it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_cco.batch_prefetch import copied
from lightning_cco.batches import forward_arguments, model_context, overrides_forward, to_device
from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.graph.modes import switch_training, undisturbed


def example_of(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments in ``module.example_input_array``, as Lightning takes them; `None` without one."""
    given = getattr(module, "example_input_array", None)
    if given is None:
        return None
    if isinstance(given, Mapping):
        return (), dict(given)
    return ((given,) if isinstance(given, Tensor) else tuple(given)), {}


def check_example(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
    """Warn of an ``example_input_array`` that ``forward`` does not take: what is loaded and exported without data would fail on it.

    Args:
        trainer: The Trainer.
        module: The module, not hooked yet.
        batch: A batch of the training, to say what is expected.
    """
    example = example_of(module)
    if example is None or not overrides_forward(module):
        return
    with model_context(trainer):
        args, kwargs = to_device(trainer, example)
        try:
            with undisturbed(module, gradients=True):  # a forward may differentiate
                switch_training(module, False)
                module(*copied(args), **copied(kwargs))
        except Exception as error:
            warnings.warn(
                f"{type(module).__name__}.example_input_array is not what its forward takes: expected {_expected(module, batch)}, "
                f"got {shapes_of((args, kwargs))} ({error}). `load_quantized` and `lightning-cco export` would fail on it. Correct it, or "
                "leave it out: then the shapes of the training are taken.",
                CCOWarning,
                stacklevel=3,
            )


def _expected(module: pl.LightningModule, batch: Any) -> str:
    try:
        return f"such as {shapes_of(forward_arguments(module, batch))}"
    except CCOError:
        return "what the training gives it"


def shapes_of(arguments: tuple[tuple[Any, ...], Mapping[str, Any]]) -> str:
    """Shapes of tensors among the arguments of a call, for messages.

    >>> import torch
    >>> shapes_of(((torch.ones(2, 3), 4), {"mask": torch.ones(2)}))
    '[2, 3], int, mask=[2]'
    """
    args, kwargs = arguments
    said = [_shape(value) for value in args] + [f"{name}={_shape(value)}" for name, value in kwargs.items()]
    return ", ".join(said)


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
