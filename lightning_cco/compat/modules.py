"""What `torch.nn.Module` keeps to itself: the code that runs a call and its hooks, and where parts and hooks are."""

from __future__ import annotations

from collections.abc import Iterable
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any

from torch import nn

from lightning_cco.compat.resolve import needed, or_else

MODULE_CALL: CodeType = needed("torch.nn.Module._call_impl.__code__")
"""The code that runs each call of a module, found on the call stack. Needed."""


def called_module(frame: FrameType) -> nn.Module | None:
    """The module whose call a Python frame runs; `None` if it runs something else.

    Private API: the name ``self`` in ``nn.Module._call_impl``. Without it: `None`.
    """
    found = frame.f_locals.get("self") if frame.f_code is MODULE_CALL else None
    return found if isinstance(found, nn.Module) else None


_FOUR: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

BatchNormBase: type[nn.modules.batchnorm._BatchNorm] = or_else("torch.nn.modules.batchnorm._BatchNorm", _FOUR)
"""Base of all batch norms, for `isinstance`. Without it: PyTorch's four."""

CONTENTS = ("_parameters", "_buffers", "_modules")
"""Attributes of a module that hold its parameters, buffers and submodules. Under other names these would be looked at twice, nothing else."""


OF_MODULES: frozenset[str] = frozenset(vars(nn.Module()))
"""Attributes that each module has from the start: its contents, mode and hooks."""


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """The dictionary of a module's own buffers.

    Private API: ``nn.Module._buffers``. Without it: an empty one, so a buffer that a forward replaces stays replaced.
    """
    found = vars(module).get("_buffers")
    return found if isinstance(found, dict) else {}


def hook_tables(module: nn.Module) -> dict[str, dict[int, Any]]:
    """The tables of what is registered on a module to be called around its forward and backward, by the names of its attributes; by number what is called.

    Private API: attributes such as ``nn.Module._forward_hooks``, told by their names. Without them: none, so hooks that a trial forward leaves stay.
    """
    return {name: hooks for name, hooks in vars(module).items() if name in OF_MODULES and "hooks" in name and isinstance(hooks, dict)}


def hooks_of(module: nn.Module) -> list[Any]:
    """Everything that is registered on a module to be called around its forward and backward."""
    return [hook for hooks in hook_tables(module).values() for hook in list(hooks.values())]


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The dictionary of a module's own submodules.

    Private API: ``nn.Module._modules``. Without it: an empty one, so modules that a trial forward replaces stay replaced.
    """
    children: dict[str, nn.Module | None] = vars(module).get("_modules", {})
    return children


def cells_of(function: FunctionType) -> tuple[CellType, ...]:
    """What a function holds of the variables of the code around it."""
    return function.__closure__ or ()


def forward_pre_hooks(module: nn.Module) -> Iterable[Any]:
    """The pre-hooks of a module's forward.

    Private API: ``nn.Module._forward_pre_hooks``. Without it: none, so a model that is quantized already is not refused by name.
    """
    return getattr(module, "_forward_pre_hooks", {}).values()


def forward_hooks(module: nn.Module) -> Iterable[Any]:
    """The hooks behind a module's forward.

    Private API: ``nn.Module._forward_hooks``. Without it: none, so hooks of the user's own see rounded tensors.
    """
    return getattr(module, "_forward_hooks", {}).values()


_GLOBAL: Any = (
    or_else("torch.nn.modules.module._global_forward_hooks", {}),
    or_else("torch.nn.modules.module._global_forward_pre_hooks", {}),
)


def global_forward_hooks() -> Iterable[Any]:
    """The hooks around the forward of all modules. Without them: none, so such hooks see rounded tensors."""
    return [hook for hooks in _GLOBAL for hook in hooks.values()]
