"""The forward hooks on each module of a model: put on, found again, refused twice, and inert in a copy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from lightning_cco.compat.callers import REDIRECTED_FORWARD
from lightning_cco.compat.modules import forward_pre_hooks
from lightning_cco.compat.resolve import refuse_missing
from lightning_cco.errors import CCOError


class Hooks:
    """Hooks on every submodule of a model. What they do when a module's call begins and ends, derived classes say.

    Args:
        model: Root of the module tree. It is hooked, never changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Hook every submodule. Code compiled before that runs on without the hooks, so it is dropped.

        Raises:
            CCOError: Somebody else's hooks are on, or the installed versions lack something.
        """
        refuse_missing()
        refuse_hooked(self.model)
        for path, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            self._handles.append(module.register_forward_pre_hook(_Enter(self, path), prepend=True, with_kwargs=True))
            self._handles.append(module.register_forward_hook(_Leave(self, path), always_call=True))
        torch.compiler.reset()

    def detach(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.reset()
        torch.compiler.reset()

    @property
    def attached(self) -> bool:
        """Whether the hooks are on."""
        return bool(self._handles)

    def need_attached(self) -> None:
        """Refuse to measure, to calibrate or to write a file of what would run in float.

        Raises:
            CCOError: The hooks are off.
        """
        if not self.attached:
            raise CCOError(
                f"{type(self.model).__name__}: its hooks are off, so it computes in float: remove() was called, another callback or quantize() has taken the "
                "model over, or this is a copy. Call quantize() on the model again; load_state_dict(state) gives it the ranges of a state_dict()."
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no hooks on the copied model, which is the plain float model."""
        return {**self.__dict__, "_handles": []}

    def reset(self) -> None:
        """Forget what is running."""
        raise NotImplementedError

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """A module's call begins. Returns the keyword arguments to go on with, if they are others."""
        raise NotImplementedError

    def leave(self, path: str, output: Any) -> None:
        """A module's call ends."""
        raise NotImplementedError


def hooks_on(model: nn.Module) -> Hooks | None:
    """The hooks that a model, or a part of it, carries."""
    for module in model.modules():
        for hook in forward_pre_hooks(module):
            if isinstance(hook, _Enter):
                return hook.hooks
    return None


def refuse_hooked(model: nn.Module) -> None:
    """Raise if a model is quantized already, whole or in part.

    Raises:
        CCOError: It is.
    """
    found = hooks_on(model)
    if found is None:
        return
    what = "it" if found.model is model else f"{type(found.model).__name__}, which shares modules with it,"
    raise CCOError(
        f"{type(model).__name__}: {what} is quantized already, and can be only once. Take the hooks off first: call .remove() on what quantize() returned, or "
        "on the callback's .quantized. To change the recipe and keep the ranges, call .replan(settings) on it instead."
    )


def release(model: nn.Module) -> bool:
    """Take the hooks off that a model carries from an earlier `quantize` or callback, of it or of a model around a part of it.

    Returns:
        Whether there were any.

    Raises:
        CCOError: A part of the model was quantized separately, such as a teacher: it would run in float from now on.
    """
    found = {
        id(hooks): hooks
        for module in model.modules()
        for hook in forward_pre_hooks(module)
        if isinstance(hook, _Enter)
        for hooks in (hook.hooks,)
    }
    for path, module in model.named_modules():
        if path and any(hooks.model is module for hooks in found.values()):
            raise CCOError(
                f"{type(model).__name__}: its part '{path}' ({type(module).__name__}) is quantized already, separately. Take its hooks off first: call "
                ".remove() on what quantize() returned, or on the callback's .quantized. To keep it quantized, hold it outside of this module."
            )
    for hooks in found.values():
        hooks.detach()
    return bool(found)


class _Enter:
    """Forward pre-hook of one module. A pickled module carries an inert one: the copy is the plain float model."""

    def __init__(self, hooks: Hooks, path: str) -> None:
        self.hooks, self.path = hooks, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path
        if not path and not is_compiling() and _is_redirected(module):
            return None
        kept = self.hooks.enter(path, module, args, kwargs)
        return None if kept is None else (args, kept)

    def __getattr__(self, name: str) -> Any:
        return _refuse_scripting(name)

    def __reduce__(self) -> Any:
        return inert, ()


class _Leave:
    """Forward hook of one module."""

    def __init__(self, hooks: Hooks, path: str) -> None:
        self.hooks, self.path = hooks, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.hooks.leave(self.path, output)

    def __getattr__(self, name: str) -> Any:
        return _refuse_scripting(name)

    def __reduce__(self) -> Any:
        return inert, ()


def _refuse_scripting(name: str) -> Any:
    if name == "__name__" and sys._getframe(2).f_globals.get("__name__", "").startswith("torch.jit"):
        raise CCOError(
            "torch.jit.script (to_torchscript() without method='trace'): a quantized model can't be scripted, since a script has no hooks. Write an INT8 file "
            "by export(path), trace the model by torch.jit.trace or to_torchscript(method='trace'), or take the hooks off by remove() first."
        )
    raise AttributeError(name)


def inert() -> Callable[..., None]:
    """What hooks of a pickled module are made of when it is loaded."""
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    return None


def _is_redirected(module: nn.Module) -> bool:
    """Whether a strategy borrows the module's ``forward`` to run something else, such as ``training_step`` under DDP.

    What the step does around the model is not the model: it must neither be quantized nor shift the indices of what is.
    """
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__name__", "") == REDIRECTED_FORWARD
