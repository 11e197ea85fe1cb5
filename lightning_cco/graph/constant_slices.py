"""Which constants are cut from one parameter or buffer: slices of it, rows of it, the same values in another order."""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_cco.graph.operands import is_mask_like
from lightning_cco.graph.ops import Category, Op

_PIECES = frozenset({"chunk", "split", "tensor_split", "unbind", "select"})
"""Kinds that take a tensor apart into pieces by their number: each is a constant of its own, as large as it always is."""
_COUNTS = frozenset({"slice", "narrow", "index_select", "gather", "embedding", "pad"})
"""Kinds that give as many values as they are asked for."""
_NAME = re.compile(r"(.*?)((?:\[-?\d+\])*)")


def whole_of(name: str) -> tuple[str, tuple[int, ...]]:
    """What the name of a whole says: of which tensor, and which piece of it, by its indices.

    >>> whole_of("encoder.tables[1][-2]"), whole_of("pos")
    (('encoder.tables', (1, -2)), ('pos', ()))
    """
    found = _NAME.fullmatch(name)
    assert found is not None
    return found[1], tuple(int(index) for index in re.findall(r"-?\d+", found[2]))


class Cuts:
    """Knows the tensors that hold values of one parameter, buffer or other tensor that a module holds, and nothing else.

    A forward that cuts a table to the length of its input (``x + self.pos[:, : x.shape[1]]``) reads another tensor for each length. So does one that cuts a
    piece of a table (``self.tables[1][: x.shape[1]]``), whose whole is that piece.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held: dict[int, tuple[Tensor, str]] = {}
        self._wholes: dict[str, Tensor] = {}
        self._cut: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._pieces: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        for path, module in model.named_modules():
            own = {**dict(module.named_buffers(recurse=False)), **dict(module.named_parameters(recurse=False))}
            for name, value in {**vars(module), **own}.items():
                if isinstance(value, Tensor) and value.is_floating_point() and id(value) not in self._held:
                    dotted = f"{path}.{name}" if path else name
                    self._held[id(value)], self._wholes[dotted] = (value, dotted), value

    def of(self, tensor: Tensor) -> str | None:
        """Name of what a tensor is cut from, or is; `None`: of nothing, of several, it is computed, or the whole holds a mask's huge values.

        It is a dotted name, with the indices of a piece behind it; see `whole_of`.
        """
        name = self._name(tensor)
        if name is None:
            return None
        held, indices = whole_of(name)
        return None if is_mask_like(self._wholes[held].detach()[indices]) else name

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
        name, piece = self._made_of(tables[0], op, args, kwargs) if len(tables) == 1 else (None, None)
        for tensor in made:
            for known, what in ((self._cut, name), (self._pieces, piece)):
                if what is None:
                    known.pop(id(tensor), None)
                else:
                    known[id(tensor)] = weakref.ref(tensor), what

    def _made_of(self, table: Tensor, op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """The name of what a call's result is cut from, and that of the piece that it is, of which others may be cut."""
        held, piece = self._held.get(id(table)), self._piece(table)
        whole = held[1] if held is not None else piece
        indices, cuts = _piece_of(op, args, kwargs)
        if indices and whole is not None:
            taken = whole + "".join(f"[{index}]" for index in indices)
            return (taken, None) if cuts else (None, taken)
        if not _selects(op, args, kwargs):
            return None, None
        if piece is None:
            return self._name(table), None
        return (piece, None) if op.kind in _COUNTS else (None, piece)

    def _piece(self, tensor: Tensor) -> str | None:
        reference, name = self._pieces.get(id(tensor), (None, None))
        return name if reference is not None and reference() is tensor else None

    def forget(self, tensor: Tensor) -> None:
        """A tensor now holds other values, too."""
        self._cut.pop(id(tensor), None)
        self._pieces.pop(id(tensor), None)


def _piece_of(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[int, ...], bool]:
    """The numbers by which a call takes a piece of a tensor, along its first axes, and whether it cuts that piece as well (``tables[1, : x.shape[1]]``)."""
    if op.kind != "slice" or len(args) < 2:
        return (), False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    numbers = tuple(itertools.takewhile(lambda part: type(part) is int, index))
    rest = index[len(numbers) :]
    if not all(part is None or part is Ellipsis or isinstance(part, slice) for part in rest):
        return (), False
    return numbers, any(isinstance(part, slice) and part != slice(None) for part in rest)


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
