"""Recomputation: activation checkpointing runs a part of the forward again inside the backward, when the frames of its callers are gone.

A checkpoint keeps the function that runs its part again. The first time that a call of the model is seen inside a checkpoint's forward, that function is
replaced by one that puts the frames back as they were then, with what they had counted so far. So every call of the recomputation has the identity that
it had in the forward: torch functions outside of any module, modules that are called several times, and checkpoints inside checkpoints included.

Compiled, a checkpoint is one operation for the compiler, with a graph of its own inside; there is no recomputation to be seen, but the mode must see inside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lightning_cco.compat.autograd import saved_hooks_on_top
from lightning_cco.compat.checkpointing import PACK_HOOK, REENTRANT_FORWARD, pack_hook_frame, reentrant_context
from lightning_cco.compat.dynamo import without_side_effect_checks
from lightning_cco.compat.modules import MODULE_CALL

COMPILED_CHECKPOINTS = ("checkpoint", "tag_activation_checkpoint")
"""Names under which a mode is shown a checkpoint that is being compiled."""


def running_checkpoint(entering: bool) -> tuple[Any, str] | None:
    """The checkpoint whose forward is running now, directly in the module that makes the call.

    Not worth asking where gradients are recorded and nobody handles saved tensors: under recorded gradients a checkpoint's forward has hooks for saved tensors
    on, without them it may be a reentrant one's.

    Args:
        entering: Whether this is asked from the pre-hook of a module, whose own call is then not the one that counts.

    Returns:
        The object that outlives the forward, and the name of its attribute that runs the part again; `None` outside of a checkpoint.
    """
    if torch.is_grad_enabled():
        hooks = saved_hooks_on_top(False)
        if hooks is None or getattr(hooks[0], "__qualname__", "") != PACK_HOOK:
            return None
        return pack_hook_frame(hooks[0])
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is REENTRANT_FORWARD:
            return reentrant_context(frame)
        if frame.f_code is MODULE_CALL:
            if not entering:
                return None
            entering = False
    return None


class Resumed:
    """Runs a function under frames of an earlier time.

    Args:
        owner: The `Frames` that they belong to.
        saved: The frames as they were, the innermost last.
        function: What to run.
    """

    def __init__(self, owner: Any, saved: list[Any], function: Callable[..., Any]) -> None:
        self.owner, self.saved, self.function = owner, saved, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function."""
        with self.owner.resumed(self.saved):
            return self.function(*args, **kwargs)

    def belongs_to(self, owner: Any) -> bool:
        """Whether it, or one that it runs in turn, puts back frames of ``owner``."""
        inner = getattr(self.function, "function", self.function)
        return self.owner is owner or any(isinstance(f, Resumed) and f.belongs_to(owner) for f in (self.function, inner))


class UnderMode:
    """Runs the function of a checkpoint that is being compiled under a mode, which is off while the mode is shown the checkpoint itself.

    Args:
        mode: The function mode.
        function: What the checkpoint runs.
    """

    def __init__(self, mode: TorchFunctionMode, function: Callable[..., Any]) -> None:
        self.mode, self.function = mode, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function."""
        # Counting calls is a side effect, which the compiler would leave its graph for. That the recomputation does not count again is just right.
        return self._run(*args, **kwargs) if without_side_effect_checks is None else without_side_effect_checks(self._run, *args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with self.mode:
            return self.function(*args, **kwargs)


class InContext:
    """Runs a function in a context."""

    def __init__(self, context: Callable[[], AbstractContextManager[None]], function: Callable[..., Any]) -> None:
        self.context, self.function = context, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        with self.context():
            return self.function(*args, **kwargs)
