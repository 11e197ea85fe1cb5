"""How activation checkpointing keeps the function that it runs again, found from inside of its forward; and how to do without it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch.utils.checkpoint

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


_RECOMPUTING = torch.utils.checkpoint.CheckpointFunction
_threads: list[int] = []
_lock = threading.Lock()


class _Direct:
    """Stands in for the function of a reentrant checkpoint: in the threads of `unrecomputed` it runs what the checkpoint holds, in others the checkpoint."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args) if threading.get_ident() in _threads else _RECOMPUTING.apply(function, preserve, *args)  # type: ignore[no-untyped-call]


@contextmanager
def unrecomputed() -> Iterator[None]:
    """Run what reentrant checkpoints hold as it is, in this thread: they run it without gradients first, and refuse gradients with respect to certain tensors.

    Blocks of several threads may end in any order. Without the name ``CheckpointFunction`` there: PyTorch refuses these gradients.
    """
    with _lock:
        _threads.append(threading.get_ident())
        torch.utils.checkpoint.CheckpointFunction = _Direct  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        with _lock:
            _threads.remove(threading.get_ident())
            if not _threads:
                torch.utils.checkpoint.CheckpointFunction = _RECOMPUTING  # type: ignore[misc]
