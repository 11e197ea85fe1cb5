"""In which module of a model an error was raised, and in which line of the user's code."""

from __future__ import annotations

from collections.abc import Iterator
from os.path import basename
from types import FrameType, TracebackType

from torch import nn

from lightning_cco.compat.modules import called_module
from lightning_cco.graph.global_state import is_own_file
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


def failing_line(error: BaseException) -> str:
    """The innermost line of the user's own code that an error came out of, in words; empty if there is none."""
    found = ""
    for frame, line in _frames_of(error):
        file = frame.f_code.co_filename
        if is_own_file(str(frame.f_globals.get("__name__", "")), file) and not file.startswith("<"):
            found = f" at line {line} of {basename(file)}"
    return found


def came_through(error: BaseException, module: str, function: str) -> bool:
    """Whether an error came out of a function of a module.

    >>> import copy
    >>> class Uncopied:
    ...     def __deepcopy__(self, known):
    ...         raise ValueError
    >>> try:
    ...     copy.deepcopy(Uncopied())
    ... except ValueError as error:
    ...     came_through(error, "copy", "deepcopy")
    True
    """
    return any(frame.f_code.co_name == function and frame.f_globals.get("__name__") == module for frame, _ in _frames_of(error))


def _frames_of(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The Python frames that an error and its causes came through, with the lines that ran, the innermost last."""
    known: BaseException | None = error
    while known is not None:
        step: TracebackType | None = known.__traceback__
        while step is not None:
            yield step.tb_frame, step.tb_lineno
            step = step.tb_next
        known = known.__cause__
