"""Calls that are not the model's own: those of compiled graphs, and of the machinery that moves parameters between processes."""

from __future__ import annotations

import sys
from collections.abc import Collection
from types import CodeType, FrameType

from lightning_cco.compat.callers import FX_FILE, INDUCTOR_FILE, LOOK_FURTHER, MACHINERY

_origins: dict[CodeType, bool | None] = {}


def is_foreign(graphs: Collection[int] = ()) -> bool:
    """Whether the torch call now seen comes from a graph that was compiled, from the compiler, or from the machinery of distributed training.

    A module compiled inside an eager one, and every ``torch.compile(model)`` (whose own hooks run eagerly), runs its graph while our mode is active.
    What is in the graph is quantized already: it must be neither quantized again nor counted. A graph of `torch.fx` that is a part of the model is the
    user's own code.

    Args:
        graphs: Identities of the model's modules that are such graphs.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if graphs and code.co_filename.startswith(FX_FILE) and id(frame.f_locals.get("self")) in graphs:
            return False
        if code not in _origins:
            module = frame.f_globals.get("__name__", "")
            foreign = module.startswith(MACHINERY) or code.co_filename.startswith(FX_FILE) or INDUCTOR_FILE in code.co_filename
            _origins[code] = None if module in LOOK_FURTHER else foreign
        origin = _origins[code]
        if origin is not None:
            return origin
        frame = frame.f_back
    return False
