"""In which module of a model an error was raised."""

from __future__ import annotations

from types import TracebackType

from torch import nn

from lightning_cco.compat.modules import called_module
from lightning_cco.names import quote


def failing_module(model: nn.Module, error: BaseException) -> str:
    """The innermost module of a model whose forward an error came out of, in words; empty if that is the model itself, or not known.

    Args:
        model: The model.
        error: What its forward raised.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2))
        >>> try:
        ...     model(torch.zeros(1, 3))
        ... except RuntimeError as error:
        ...     print(failing_module(model, error))
         in module '1' (Linear)
    """
    paths = {id(module): path for path, module in model.named_modules() if path}
    found: nn.Module | None = None
    step: TracebackType | None = error.__traceback__
    while step is not None:
        here = called_module(step.tb_frame)
        if here is not None and id(here) in paths:
            found = here
        step = step.tb_next
    return "" if found is None else f" in module {quote(paths[id(found)])} ({type(found).__name__})"
