"""Python's own frames: which call of a module is running, and where in the user's code."""

from __future__ import annotations

import sys
from types import FrameType

from lightning_cco.compat.callers import FX_FILE
from lightning_cco.compat.modules import MODULE_CALL
from lightning_cco.graph.code_places import place_of


def module_call(frame: FrameType | None) -> FrameType | None:
    """The innermost call of a module around a Python frame."""
    while frame is not None and frame.f_code is not MODULE_CALL:
        frame = frame.f_back
    return frame


def called_by_graph(call: FrameType) -> bool:
    """Whether code of a graph of `torch.fx` makes the call of a module."""
    frame = call.f_back
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torch.nn.modules.module"):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(FX_FILE)


def position_of_module_call() -> int:
    """Place in the user's code of the call of the module whose hooks run now, in the function that calls it; -1 if that is PyTorch's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not MODULE_CALL:
        frame = frame.f_back
    frame = frame.f_back if frame is not None else None
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torch."):
        if frame.f_code is MODULE_CALL:
            return -1
        frame = frame.f_back
    return -1 if frame is None else place_of(frame)


def _users_frame(frame: FrameType) -> FrameType | None:
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("torch.", "lightning_cco.")):
        if frame.f_code is MODULE_CALL:
            return None
        frame = frame.f_back
    return frame


def calling_line() -> str:
    """The same place as `calling_position`, as `traced_line` gives it; empty for -1."""
    frame = _users_frame(sys._getframe(1))
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def calling_position() -> int:
    """Place in the user's code of the torch call that is running, in the innermost function that isn't PyTorch's or ours.

    -1 if the module that runs now has no such code: one of PyTorch's, or a subclass that inherits its ``forward``. Who calls the module tells nothing.
    """
    frame = _users_frame(sys._getframe(1))
    return -1 if frame is None else place_of(frame)
