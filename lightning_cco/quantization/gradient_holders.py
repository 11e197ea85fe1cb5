"""Who else sees a gradient: one that nobody but its backward holds may be overwritten, as autograd does itself with gradients that it adds up."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lightning_cco.compat.autograd import storage_holders, tensor_holders


def holders(grad: Tensor) -> tuple[int, ...]:
    """How many in C++ and in Python hold a tensor, how many its memory, and how many the tensor that it is a view of."""
    counts = tensor_holders(grad), sys.getrefcount(grad), storage_holders(grad.untyped_storage()._cdata)
    base = grad._base
    return counts if base is None else (*counts, tensor_holders(base), sys.getrefcount(base))


class _HolderCount(torch.autograd.Function):
    """Counts who holds a gradient that nobody but its backward sees."""

    counts: tuple[int, ...] = ()

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _HolderCount.counts = holders(grad)
        return grad


_found: dict[tuple[str, int], tuple[tuple[int, ...], ...]] = {}


def fewest_holders(device: str = "cpu") -> tuple[tuple[int, ...], ...]:
    """The counts of `holders` for gradients that may be overwritten, as autograd itself does: one of its own memory, one that is a view.

    ``device``: the type of device; a backward on a GPU runs in a separate thread.

    They depend on the versions of Python and PyTorch, and on how the interpreter calls functions now. Where PyTorch does not tell them, no gradient is ever
    taken for one's own.
    """
    key = device, _references_of_calls()
    if key not in _found:
        # In a separate thread, which no hooks for saved tensors and no modes of the caller see: a checkpoint would count what is saved here as its own.
        with ThreadPoolExecutor(1) as thread:
            _found[key] = thread.submit(_counted, device).result()
    return _found[key]


def known_holders(device: str) -> tuple[tuple[int, ...], ...]:
    """The same if it has been found out before: a backward must not wait for another one."""
    return _found.get((device, _references_of_calls()), ())


def _references_of_calls() -> int:
    """How often a call holds its argument: once more while something watches the interpreter's calls (a compiler), since they are made otherwise then."""
    return _references(object())


def _references(argument: object) -> int:
    return sys.getrefcount(argument)


def _counted(device: str) -> tuple[tuple[int, ...], ...]:
    found = []
    try:
        for shape in ((2,), (2, 1)):
            with torch.enable_grad():
                ones = torch.ones(2, dtype=torch.float32, device=device)
                y = _HolderCount.apply(ones.clone().requires_grad_())  # type: ignore[no-untyped-call]
                ((y if shape == (2,) else y.view(shape)) * ones.clone().view(shape)).sum().backward()
            found.append(_HolderCount.counts)
    except (AttributeError, RuntimeError):
        return ()
    return tuple(found)
