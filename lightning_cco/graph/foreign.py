"""Calls that are not the model's own: those of compiled graphs, and of the machinery that moves parameters between processes."""

from __future__ import annotations

import sys
from collections.abc import Collection
from enum import Enum
from types import CodeType, FrameType

from lightning_cco.compat.callers import FX_FILE, INDUCTOR_FILE, LOOK_FURTHER, MACHINERY

_origins: dict[CodeType, bool | None] = {}


class Origin(Enum):
    """Whose a torch call is."""

    MODEL = "model"
    FOREIGN = "foreign"
    """Of a graph that was compiled, of the compiler, or of the machinery of distributed training."""
    ENDED = "ended"
    """The model's, but the call of the module that it is thought to belong to is over."""


def origin_of_call(graphs: Collection[int] = (), running: int = 0) -> Origin:
    """Whose the torch call is that the caller's caller was shown, told from the Python frames around it.

    A module compiled inside an eager one, and every ``torch.compile(model)`` (whose own hooks run eagerly), runs its graph while our mode is active.
    What is in the graph is quantized already: it must be neither quantized again nor counted. A graph of `torch.fx` that is a part of the model is the
    user's own code.

    Args:
        graphs: Identities of the model's modules that are such graphs.
        running: Identity of the Python frame of the module's call, which is looked for as well; 0 if unknown.
    """
    frame: FrameType | None = sys._getframe(3)
    innermost = frame
    while frame is not None:
        code = frame.f_code
        if graphs and code.co_filename.startswith(FX_FILE) and id(frame.f_locals.get("self")) in graphs:
            break
        if code not in _origins:
            module = frame.f_globals.get("__name__", "")
            other = module.startswith(MACHINERY) or code.co_filename.startswith(FX_FILE) or INDUCTOR_FILE in code.co_filename
            _origins[code] = None if module in LOOK_FURTHER else other
        foreign = _origins[code]
        if foreign:
            return Origin.FOREIGN
        if foreign is not None:
            break
        frame = frame.f_back
    if not running:
        return Origin.MODEL
    while innermost is not None:
        if id(innermost) == running:
            return Origin.MODEL
        innermost = innermost.f_back
    return Origin.ENDED
