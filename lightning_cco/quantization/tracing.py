"""Somebody else's tracing: whether operations run now as they are, on memory, or are traced, transformed or watched.

Kernels, buffers written in place and memory taken again are for plain running alone. Under everything else quantizers are plain differentiable operations
of PyTorch, which any tracer records and any transform knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_functorch_level = torch._C._functorch.peek_interpreter_stack
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_key_included = torch._C._dispatch_tls_is_dispatch_key_included
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_PRE_DISPATCH, _VMAP = (
    torch._C.DispatchKey.PreDispatch,
    torch._C._dispatch_key_parse("VmapMode"),
)  # the latter is that of vectorized autograd


def runs_plainly() -> bool:
    """Whether operations run now as they are: nobody traces them, transforms them, differentiates them forwards or watches them by a dispatch mode.

    `torch.jit.trace`, `make_fx`, `torch.export`, fake tensors, `torch.func`, vectorized autograd, forward-mode AD, flop counters: none of them would see what a
    kernel does, and some hand out tensors without memory. The one place where this is decided.
    """
    return not (
        torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or _functorch_level() is not None
        or forward_ad._current_level >= 0
        or _key_included(_PRE_DISPATCH)
        or _key_included(_VMAP)
        or torch.compiler.is_compiling()
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but strided memory: no subclass, and none of the tensors that PyTorch computes only when they are read."""
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and not (tensor.is_neg() or tensor._is_zerotensor() or _is_wrapped(tensor))
    )


@contextmanager
def behind_transforms(tensor: Tensor) -> Iterator[Tensor | None]:
    """The values behind a tensor that `torch.func` has wrapped, all samples of a `vmap` included, with the transforms off inside the block.

    So ranges follow under per-sample gradients as they do in any training. `None` where there are no values (fake tensors), or where looking at them would
    become a part of somebody's graph.
    """
    traced = torch._C._is_tracing() or _key_included(_PRE_DISPATCH)
    if traced or any(getattr(mode, "_mode_key", None) is not None for mode in _get_current_dispatch_mode_stack()):
        yield None
        return
    values: Any = tensor
    while _is_wrapped(values):
        values = torch._C._functorch.get_unwrapped(values)
    if type(values) not in _PLAIN or values.device.type == "meta":
        yield None
        return
    with temporarily_clear_interpreter_stack(), torch.no_grad():
        yield values.detach()
