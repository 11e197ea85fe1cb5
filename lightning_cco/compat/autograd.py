"""What autograd does not say in public: which pass runs, who handles saved tensors, and who else holds a tensor."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

from lightning_cco.compat.resolve import needed, or_else

graph_task: Callable[[], int] = needed("torch._C._current_graph_task_id")
"""Number of the backward that runs in this thread; -1 outside of one. Needed: in a recomputation ranges must not move a second time."""

saved_hooks_on_top: Callable[[bool], Any] = needed("torch._C._autograd._top_saved_tensors_default_hooks")
"""The innermost hooks for saved tensors, as a pair of functions, or `None`; the argument says whether tracing is looked through. Needed."""

saved_hooks_enabled: Callable[[], bool] = or_else("torch._C._autograd._saved_tensors_hooks_is_enabled", lambda: False)
"""Whether hooks for saved tensors may be used now. Without it: never, so rounded weights are kept until the backward (more memory)."""

_numbers = itertools.count(1 << 20)


def _never_twice(held: Any) -> int:
    """A count that equals no count that was seen before: then nothing is ever taken for one's own."""
    return next(_numbers)


storage_holders: Callable[[int], int] = or_else("torch._C._storage_Use_Count", _never_twice)
"""How many hold the memory at ``storage._cdata``. Without it: as if somebody else always did (new memory for each gradient and rounded weight)."""

tensor_holders: Callable[[Tensor], int] = or_else("torch.Tensor._use_count", _never_twice)
"""How many in C++ hold a tensor. Without it: as if somebody else always did (new memory for each gradient)."""


def _copy_each(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


foreach_copy: Callable[[Sequence[Tensor], Sequence[Tensor]], Any] = or_else("torch._foreach_copy_", _copy_each)
"""Copies a list of tensors into another. Without it: one by one (slower)."""


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without the Python around it, which looks for transforms of `torch.func`: for calls that are known to run plainly.

    Private API: that ``torch.autograd.Function.apply`` calls an ``apply`` of its base class. Without it: ``function.apply`` (slower).
    """
    found: Callable[..., Any] = getattr(super(torch.autograd.Function, function), "apply", function.apply)
    return found


def forwards_of_functions() -> dict[CodeType, type[torch.autograd.Function]]:
    """The code of the ``forward`` of each custom autograd function, also of one behind decorators (`torch.amp.custom_fwd`), and its class.

    ``Function.apply`` itself is written in C since PyTorch 2.14, and leaves no frame. What Python code can't be found of (a scripted function) calls no torch
    functions that a function mode sees.
    """
    found: dict[CodeType, type[torch.autograd.Function]] = {}
    pending = list(torch.autograd.Function.__subclasses__())
    while pending:
        function = pending.pop()
        pending += function.__subclasses__()
        code = getattr(inspect.unwrap(_whole(function.forward)), "__code__", None)
        if code is not None:
            found.setdefault(code, function)
    return found


def _whole(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def given_to(frame: FrameType, function: type[torch.autograd.Function]) -> tuple[Any, ...] | None:
    """What a custom function was called with, from the frame that runs its ``forward``; `None` if somebody calls ``forward`` as an ordinary function.

    Private API: a frame's ``f_locals``, which Python documents. They are the arguments as long as the code has not assigned to their names.
    """
    code, local = frame.f_code, frame.f_locals
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    given = [local.get(name) for name in names]
    further = code.co_varnames[
        len(names) : len(names) + bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    ]
    given += [value for name in further for value in _values(local.get(name))]
    if function.setup_context is not torch.autograd.Function.setup_context:
        return tuple(given)
    return tuple(given[1:]) if given and hasattr(given[0], "save_for_backward") else None


def _values(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container or ()


def softmax_of(node: Any) -> tuple[tuple[int, ...] | None, int]:
    """Of the node of a softmax, or of a loss of log-probabilities: the shape of what it has read, and the dimension of its classes.

    Private API: ``_saved_self``, ``_saved_result`` and ``_saved_dim`` of autograd's nodes. Without them: `None` for the shape, and outputs are compared by
    their values.
    """
    name = node.name()
    saved = getattr(node, "_saved_result" if "Softmax" in name else "_saved_self", None)
    if saved is None:
        return None, 0
    shape = tuple(saved.shape)
    if "NllLoss" in name:
        return shape, 1 if len(shape) > 1 else 0
    dim = getattr(node, "_saved_dim", -1)
    return shape, _signed(dim[0] if isinstance(dim, (tuple, list)) else dim)


def _signed(dim: int) -> int:
    return dim - (1 << 64) if dim >= 1 << 63 else dim
