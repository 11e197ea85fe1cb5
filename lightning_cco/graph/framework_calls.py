"""Calls that are not the model's own: those of compiled graphs, and of the machinery that moves parameters between processes."""

from __future__ import annotations

import sys
from collections.abc import Collection
from enum import Enum
from types import CodeType, FrameType

from lightning_cco.compat.callers import FX_FILE, INDUCTOR_FILE, LOOK_FURTHER, MACHINERY
from lightning_cco.compat.modules import MODULE_CALL

_origins: dict[CodeType, bool | None] = {}
_NEW = object()


class CallOwner(Enum):
    """Whose a torch call is."""

    MODEL = "model"
    FOREIGN = "foreign"
    """Of a graph that was compiled, of the compiler, or of the machinery of distributed training."""
    ENDED = "ended"
    """The model's, but the call of the module that it is thought to belong to is over."""


def owner_of_call(graphs: Collection[int] = (), running: int = 0) -> CallOwner:
    """Whose the torch call is that the caller, a function mode, was shown, told from the Python frames around it.

    A module compiled inside an eager one, and every ``torch.compile(model)`` (whose own hooks run eagerly), runs its graph while our mode is active.
    What is in the graph is quantized already: it must be neither quantized again nor counted. A graph of `torch.fx` that is a part of the model is the
    user's own code.

    Args:
        graphs: Identities of the model's modules that are such graphs.
        running: Identity of the Python frame of the module's call, which is looked for as well; 0 if unknown.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        foreign = _origins.get(frame.f_code, _NEW)
        if foreign is None:
            frame = frame.f_back
            continue
        if foreign is False or (graphs and frame.f_code.co_filename.startswith(FX_FILE) and id(frame.f_locals.get("self")) in graphs):
            break
        if foreign is True:
            return CallOwner.FOREIGN
        _origins[frame.f_code] = _is_foreign(frame)
    if not running:
        return CallOwner.MODEL
    while frame is not None:
        if frame.f_code is MODULE_CALL and id(frame) == running:
            return CallOwner.MODEL
        frame = frame.f_back
    return CallOwner.ENDED


def _is_foreign(frame: FrameType) -> bool | None:
    """Whether the code that a frame runs is machinery; `None`: it stands between a call and who makes it."""
    module, file = frame.f_globals.get("__name__", ""), frame.f_code.co_filename
    if module in LOOK_FURTHER:
        return None
    return module.startswith(MACHINERY) or file.startswith(FX_FILE) or INDUCTOR_FILE in file
