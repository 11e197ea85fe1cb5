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
from torch.autograd import forward_ad

from lightning_cco.compat.torch_modes import (
    PRE_DISPATCH,
    VMAP_MODE,
    dispatch_key_included,
    dispatch_mode_count,
    functorch_level,
    functorch_value,
    is_functorch_wrapped,
    is_jit_tracing,
    values_are_traced,
    without_transforms,
)

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def runs_plainly() -> bool:
    """Whether operations run now as they are: nobody traces them, transforms them, differentiates them forwards or watches them by a dispatch mode.

    `torch.jit.trace`, `make_fx`, `torch.export`, fake tensors, `torch.func`, vectorized autograd, forward-mode AD, flop counters: none of them would see what a
    kernel does, and some hand out tensors without memory. The one place where this is decided.
    """
    return not (
        is_jit_tracing()
        or dispatch_mode_count()
        or functorch_level() is not None
        or forward_ad._current_level >= 0
        or dispatch_key_included(PRE_DISPATCH)
        or dispatch_key_included(VMAP_MODE)
        or torch.compiler.is_compiling()
    )


def without_gradient(x: Tensor) -> Tensor:
    """A tensor's values as a constant, also in a graph of `make_fx` that is differentiated later.

    Since PyTorch 2.14 such a graph holds ``x.detach()`` as an alias, through which gradients pass. They do not pass through integers.
    """
    if torch.compiler.is_compiling() or functorch_level() is not None or not values_are_traced():
        return x.detach()
    return x.detach().view(_INTEGERS[x.element_size()]).view(x.dtype)


def reads_at_once(device: torch.device) -> bool:
    """Whether Python can read a value there without waiting for what a device has yet to compute."""
    return device.type == "cpu"


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but strided memory: no subclass, and none of the tensors that PyTorch computes only when they are read."""
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and not (tensor.is_neg() or tensor._is_zerotensor() or is_functorch_wrapped(tensor))
    )


@contextmanager
def behind_transforms(tensor: Tensor) -> Iterator[Tensor | None]:
    """The values behind a tensor that `torch.func` has wrapped, all samples of a `vmap` included, with the transforms off inside the block.

    So ranges follow under per-sample gradients as they do in any training. `None` where there are no values (fake tensors), or where looking at them would
    become a part of somebody's graph.
    """
    traced = is_jit_tracing() or dispatch_key_included(PRE_DISPATCH)
    if traced or values_are_traced():
        yield None
        return
    values: Any = tensor
    while is_functorch_wrapped(values):
        values = functorch_value(values)
    if type(values) not in _PLAIN or values.device.type == "meta":
        yield None
        return
    with without_transforms(), torch.no_grad():
        yield values.detach()
