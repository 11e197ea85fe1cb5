"""Recurrent layers in traces: PyTorch finds the shape of their result by computing each time step, which takes hours for long sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_cco.compat.resolve import or_else

_OVERLOADS = (torch.ops.aten.gru.input, torch.ops.aten.lstm.input, torch.ops.aten.rnn_tanh.input, torch.ops.aten.rnn_relu.input)
_FakeTensor = or_else("torch._subclasses.fake_tensor.FakeTensor", None)
"""Private API: ``torch._subclasses.fake_tensor.FakeTensor``. Without it: sequences are unrolled, as PyTorch does."""
_decompositions: dict[Any, Any] = or_else("torch._decomp.decomposition_table", {})
"""Private API: ``torch._decomp.decomposition_table``. Without it: the same."""


@contextmanager
def shapes_of_sequences() -> Iterator[None]:
    """While it lasts, fake tensors go through LSTM, GRU and RNN layers by their shapes alone. Real tensors are computed as ever.

    Private API: ``torch._ops.OpOverload.py_kernels`` and ``torch._ops.OpOverload._dispatch_cache``. Without them: sequences are unrolled, as PyTorch does.
    """
    kernels = [getattr(overload, "py_kernels", {}) for overload in _OVERLOADS]
    entries = [(table, key) for table in kernels for key in table] + [(_decompositions, overload) for overload in _OVERLOADS]
    before = [(table, key, table[key]) for table, key in entries if _FakeTensor is not None and key in table]
    try:
        for table, key, compute in before:
            table[key] = _by_shapes(compute)
        _forget()
        yield
    finally:
        for table, key, compute in before:
            table[key] = compute
        _forget()


def _forget() -> None:
    """Let PyTorch look its tables up again."""
    for overload in _OVERLOADS:
        getattr(overload, "_dispatch_cache", {}).clear()


def _by_shapes(compute: Callable[..., Any]) -> Callable[..., Any]:
    def shapes(x: Tensor, states: Any, *args: Any) -> Any:
        if not isinstance(x, _FakeTensor):
            return compute(x, states, *args)
        *_, bidirectional, batch_first = args  # the last ones of all four operators
        ends = [states] if isinstance(states, Tensor) else list(states)
        batch, length = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
        output = x.new_empty((length, batch, ends[0].shape[2] * (2 if bidirectional else 1)))
        return (output.transpose(0, 1) if batch_first else output, *(end.new_empty(end.shape) for end in ends))

    return shapes
