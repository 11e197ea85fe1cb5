"""Function modes, dispatch modes, tracing and the transforms of `torch.func`: who watches or changes a torch call.

All names here are the functions of PyTorch themselves: they are asked at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lightning_cco.compat.resolve import needed, or_else

function_mode_count: Callable[[], int] = needed("torch._C._len_torch_function_stack")
"""How many function modes are active. Needed."""

function_mode_at: Callable[[int], Any] = needed("torch._C._get_function_stack_at")
"""The function mode at a depth, 0 the outermost. Needed."""

pop_function_mode: Callable[[], Any] = needed("torch._C._pop_torch_function_stack")
"""Takes the innermost function mode off. Needed."""

push_function_mode: Callable[[Any], None] = needed("torch._C._push_on_torch_function_stack")
"""Makes a function mode the innermost. Needed."""

is_jit_tracing: Callable[[], bool] = or_else("torch._C._is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]
"""Whether `torch.jit.trace` runs. Without it: `torch.jit.is_tracing`, two Python calls slower."""

dispatch_mode_count: Callable[[], int] = or_else("torch._C._len_torch_dispatch_stack", lambda: 1)
"""How many dispatch modes are active. Without it: as if there were one, so quantizers never use their kernels (slower)."""

dispatch_modes: Callable[[], list[Any]] = needed("torch.utils._python_dispatch._get_current_dispatch_mode_stack")
"""The active dispatch modes. Needed: ranges must not follow values that a tracer made up."""

dispatch_key_included: Callable[[Any], bool] = needed("torch._C._dispatch_tls_is_dispatch_key_included")
"""Whether calls of this thread go through a dispatch key. Needed."""

PRE_DISPATCH: Any = needed("torch._C.DispatchKey.PreDispatch")
"""The dispatch key under which `torch.export` records. Needed."""

_parse_key: Callable[[str], Any] = needed("torch._C._dispatch_key_parse")
VMAP_MODE: Any = _parse_key("VmapMode") if hasattr(torch._C, "_dispatch_key_parse") else None
"""The dispatch key of vectorized autograd (``is_grads_batched``), which Python has no name for. Needed."""

functorch_level: Callable[[], Any] = needed("torch._C._functorch.peek_interpreter_stack")
"""The innermost transform of `torch.func` that runs, or `None`. Needed."""

is_functorch_wrapped: Callable[[Tensor], bool] = needed("torch._C._functorch.is_functorch_wrapped_tensor")
"""Whether a transform of `torch.func` has wrapped a tensor. Needed."""

functorch_value: Callable[[Tensor], Tensor] = needed("torch._C._functorch.get_unwrapped")
"""The tensor one level below a transform of `torch.func`. Needed."""

without_transforms: Callable[[], AbstractContextManager[Any]] = needed("torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack")
"""Turns the transforms of `torch.func` off inside the block. Needed."""


def values_are_traced() -> bool:
    """Whether a dispatch mode that records or imitates (fake tensors, `make_fx`) is active.

    Private API: the attribute ``_mode_key``, which PyTorch gives to such modes alone. Without it: none counts as one, so a graph of `make_fx` also holds the
    operations that follow the ranges, whose results nothing in it reads.
    """
    return any(getattr(mode, "_mode_key", None) is not None for mode in dispatch_modes())
