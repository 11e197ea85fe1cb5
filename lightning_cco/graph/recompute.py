"""Recomputation: activation checkpointing runs a part of the forward again inside the backward, when the frames of its callers are gone.

A checkpoint keeps the function that runs its part again. The first time that a call of the model is seen inside a checkpoint's forward, that function is
replaced by one that puts the frames back as they were then, with what they had counted so far. So every call of the recomputation has the identity that
it had in the forward: torch functions outside of any module, modules that are called several times, and checkpoints inside checkpoints included.

Compiled, a checkpoint is one operation for the compiler, with a graph of its own inside; there is no recomputation to be seen, but the mode must see inside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

_hooks_on_top: Callable[[bool], Any] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_PACK_HOOK = "_checkpoint_hook.__init__.<locals>.pack_hook"
_MODULE_CALL = nn.Module._call_impl.__code__
COMPILED_CHECKPOINTS = ("checkpoint", "tag_activation_checkpoint")
"""Names under which a mode is shown a checkpoint that is being compiled."""
_without_checks: Callable[..., Any] | None = getattr(torch._dynamo.utils, "_disable_side_effect_safety_checks_for_current_subtracer", None)
_REENTRANT_FORWARD = CheckpointFunction.forward.__code__


def running_checkpoint(entering: bool) -> tuple[Any, str] | None:
    """The checkpoint whose forward is running now, directly in the module that makes the call.

    Args:
        entering: Whether this is asked from the pre-hook of a module, whose own call is then not the one that counts.

    Returns:
        The object that outlives the forward, and the name of its attribute that runs the part again; `None` outside of a checkpoint.
    """
    if torch.is_grad_enabled():
        hooks = _hooks_on_top(False) if _hooks_on_top is not None else None
        if hooks is None or getattr(hooks[0], "__qualname__", "") != _PACK_HOOK:
            return None
        pack = hooks[0]
        return pack.__closure__[pack.__code__.co_freevars.index("frame")].cell_contents, "recompute_fn"
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is _REENTRANT_FORWARD:
            context = frame.f_locals["ctx"]
            return (context, "run_function") if hasattr(context, "run_function") else None
        if frame.f_code is _MODULE_CALL:
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
        return self._run(*args, **kwargs) if _without_checks is None else _without_checks(self._run, *args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with self.mode:
            return self.function(*args, **kwargs)
