"""How a batch becomes the arguments of a model, where the user does not say it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lightning_cco.errors import CCOError

Forward = Callable[[nn.Module, Any], Any]
"""How one batch goes through the model."""


def call_with(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: a mapping gives keyword arguments, a tuple or list positional ones, anything else the one argument.

    Raises:
        CCOError: The model's ``forward`` does not take as many.
    """
    args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {})
    _check_arguments(model, args, kwargs)
    return model(*args, **kwargs)


def _check_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # nothing is known of it
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        came = f"the keys {list(kwargs)}" if kwargs else f"{len(args)} item{'s' if len(args) != 1 else ''}"
        raise CCOError(
            f"{type(model).__name__}.forward expects the arguments {signature}, but a batch has {came}: {error}. Give batches of these arguments alone, "
            "such as [x] or [(x, mask)], or say how a batch goes through the model: forward=lambda model, batch: model(batch[0])."
        ) from error
