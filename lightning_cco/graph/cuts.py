"""Which constants are cut from one parameter or buffer: slices of it, rows of it, the same values in another order."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_cco.graph.operands import is_mask_like
from lightning_cco.graph.ops import Category, Op

_PIECES = frozenset({"chunk", "split", "tensor_split", "unbind", "select"})
"""Kinds that take a tensor apart into pieces by their number: each is a constant of its own, as large as it always is."""


class Cuts:
    """Knows the tensors that hold values of one parameter, buffer or other tensor that a module holds, and nothing else.

    A forward that cuts a table to the length of its input (``x + self.pos[:, : x.shape[1]]``) reads another tensor for each length.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held: dict[int, tuple[Tensor, str]] = {}
        self._wholes: dict[str, Tensor] = {}
        self._cut: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        for path, module in model.named_modules():
            own = {**dict(module.named_buffers(recurse=False)), **dict(module.named_parameters(recurse=False))}
            for name, value in {**vars(module), **own}.items():
                if isinstance(value, Tensor) and value.is_floating_point() and id(value) not in self._held:
                    dotted = f"{path}.{name}" if path else name
                    self._held[id(value)], self._wholes[dotted] = (value, dotted), value

    def of(self, tensor: Tensor) -> str | None:
        """Dotted name of what a tensor is cut from, or is; `None`: of nothing, of several, it is computed, or the whole holds a mask's huge values."""
        name = self._name(tensor)
        return None if name is None or is_mask_like(self._wholes[name]) else name

    def _name(self, tensor: Tensor) -> str | None:
        held = self._held.get(id(tensor))
        if held is not None:
            return held[1]
        reference, name = self._cut.get(id(tensor), (None, None))
        return name if reference is not None and reference() is tensor else None

    def note(self, op: Op, args: Sequence[Any], kwargs: Mapping[str, Any], read: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Note what a call has made of constants.

        Args:
            op: The operation.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            read: The tensors that it has read.
            made: The tensors that it has made, or written to.
        """
        tables = [tensor for tensor in read if tensor.is_floating_point()]
        name = self._name(tables[0]) if len(tables) == 1 and _selects(op, args, kwargs) else None
        for tensor in made:
            if name is None:
                self._cut.pop(id(tensor), None)
            else:
                self._cut[id(tensor)] = weakref.ref(tensor), name

    def forget(self, tensor: Tensor) -> None:
        """A tensor now holds other values, too."""
        self._cut.pop(id(tensor), None)


def _selects(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call gives values of a tensor as they are, how many of them may depend on sizes."""
    if op.kind == "embedding":
        return len(args) < 4 and kwargs.get("max_norm") is None
    if op.kind == "pad":
        return not (args[3] if len(args) > 3 else kwargs.get("value"))
    if op.kind == "slice" and len(args) > 1:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return not any(isinstance(part, int) for part in index)  # ``table[0]`` is a piece
    return op.category is Category.ALIAS or (op.category is Category.PRESERVE and op.kind not in _PIECES)
