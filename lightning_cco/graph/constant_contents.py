"""What the constants of a forward hold, so that it shows when something out of sight has written to one: NumPy in its memory, an extension."""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor

from lightning_cco.graph.origins import unwrapped

_Content = tuple[float, float, float]


class ConstantContents:
    """Knows what tensors held when a call was last seen to make them, or to write to them."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], _Content]] = {}

    def note(self, *tensors: Tensor) -> None:
        """Note what tensors hold now."""
        for tensor in tensors:
            content = _content(tensor)
            if content is not None:
                self._known[id(tensor)] = weakref.ref(tensor), content

    def has_changed(self, tensor: Tensor) -> bool:
        """Whether a tensor holds something else than when it was noted; not if it never was."""
        known = self._known.get(id(tensor))
        if known is None or known[0]() is not tensor:
            return False
        content = _content(tensor)
        return content is not None and content != known[1]


def _content(tensor: Tensor) -> _Content | None:
    """Sum, smallest and largest value; `None` of tensors that are empty, traced, or of a type without sums.

    >>> _content(torch.tensor([1.0, float("nan")])), _content(torch.tensor([True, False])), _content(torch.empty(0))
    ((-1.0, -1.0, -1.0), (1.0, 0.0, 1.0), None)
    """
    tensor = unwrapped(tensor)
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
        return None
    with torch.no_grad(), torch.DisableTorchFunction():
        try:
            values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
            found = (float(values.sum(dtype=torch.float64)), float(values.min()), float(values.max()))
        except (RuntimeError, NotImplementedError):  # floats of 8 bits
            return None
    return (-1.0, -1.0, -1.0) if any(map(math.isnan, found)) else found
