"""How activation checkpointing keeps the function that it runs again, found from inside of its forward."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from lightning_cco.compat.resolve import needed

REENTRANT_FORWARD: CodeType = needed("torch.utils.checkpoint.CheckpointFunction.forward.__code__")
"""The code of a reentrant checkpoint's forward, found on the call stack. Needed."""

PACK_HOOK: str = needed("torch.utils.checkpoint._checkpoint_hook").__name__ + ".__init__.<locals>.pack_hook"
"""Qualified name of the hook by which a checkpoint (not reentrant) takes what autograd saves. Needed."""


def pack_hook_frame(pack: Callable[..., Any]) -> tuple[Any, str]:
    """The object that a checkpoint's pack hook belongs to, and the name of its attribute that runs the part again.

    Private API: the hook's closure, whose ``frame`` has ``recompute_fn``. Without it: `ValueError` in the first forward under a checkpoint.
    """
    assert pack.__closure__ is not None
    return pack.__closure__[pack.__code__.co_freevars.index("frame")].cell_contents, "recompute_fn"


def reentrant_context(frame: FrameType) -> tuple[Any, str] | None:
    """The same of a reentrant checkpoint, from the Python frame of its forward; `None` before it has kept its function.

    Private API: the context ``ctx`` with ``run_function``. Without it: `KeyError`, or the recomputation stays in float and is reported as drift.
    """
    context = frame.f_locals["ctx"]
    return (context, "run_function") if hasattr(context, "run_function") else None
