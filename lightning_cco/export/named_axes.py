"""Axes after the batch that a user names: a file is run along them at other sizes than the example's, as along those that are found to vary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cco.export.dynamic_sizes import lengthened, other_sizes, takes
from lightning_cco.export.errors import SizesDoNotVary
from lightning_cco.quantization.model import HookedModel

Shapes = Sequence[Sequence[Any]]
"""Of each input, a number for an axis that is fixed, and a name for one that varies."""
Bounds = Sequence[Sequence[tuple[int, int]]]
"""Of each axis of each input, the smallest and the largest size that the trace holds for."""
_MOST = 2**31
_INSTEAD = (
    "Leave it out of the axes that vary, or give it limits: dynamic_shapes={argument: {axis: torch.export.Dim(name, min=..., max=...)}}."
)


def bounds_of(program: torch.export.ExportedProgram) -> Bounds:
    """The sizes that a trace holds for, by the axes of its inputs."""
    ranges = {
        str(symbol): (int(found.lower), int(found.upper) if found.upper < _MOST else _MOST)
        for symbol, found in program.range_constraints.items()
    }
    given = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in program.graph_signature.user_inputs]
    shapes = [getattr(node.meta.get("val"), "shape", ()) for node in given]
    return [[ranges.get(str(size), (0, _MOST)) for size in shape] for shape in shapes]


def check_named_axes(
    quantized: HookedModel,
    forward: nn.Module,
    tensors: tuple[Tensor, ...],
    names: Sequence[str],
    shapes: Shapes,
    bounds: Bounds,
    agree: Callable[..., bool],
) -> None:
    """Run a file and its model at other sizes along all axes that were named, or where the model takes none so, along each of them alone.

    Args:
        quantized: The model.
        forward: Its forward.
        tensors: A batch that both take.
        names: What the inputs are called.
        shapes: Of each of the file's inputs.
        bounds: What sizes it holds for.
        agree: Runs both on a batch, which is said to be somewhere, and says what to do instead in its errors.

    Raises:
        SizesDoNotVary: The file gives other values there, or the model takes no other size along an axis.
    """

    def agrees_along(shapes: Shapes) -> bool:
        for other in _others(tensors, shapes):
            if _within(other, bounds) and takes(quantized, forward, other):
                changed = next(number for number, (new, old) in enumerate(zip(other, tensors, strict=True)) if new.shape != old.shape)
                sizes, before = list(other[changed].shape), list(tensors[changed].shape)
                where = f"with '{names[changed]}' of the sizes {sizes} instead of {before},"
                if agree(tensors=other, where=where, instead=_INSTEAD):
                    return True
        return False

    varying = list(dict.fromkeys(size for shape in shapes for axis, size in enumerate(shape) if axis and isinstance(size, str)))
    if not varying or len(shapes) != len(tensors) or agrees_along(shapes):
        return
    for name in varying:
        alone = [[size if size == name else 0 for size in shape] for shape in shapes]
        if not agrees_along(alone):
            number, axis = next((n, a) for n, shape in enumerate(alone) for a, size in enumerate(shape) if a and size == name)
            raise SizesDoNotVary(
                f"axis {axis} of '{names[number]}' was to vary, but {type(quantized.model).__name__} took no other size there than "
                f"{tensors[number].shape[axis]} that was tried, so nothing shows that a file would be right. {_INSTEAD}"
            )


def _others(tensors: tuple[Tensor, ...], shapes: Shapes) -> Iterator[tuple[Tensor, ...]]:
    """Half as long, twice, one and a half times; one longer and one shorter, for sizes that have limits."""
    yield from other_sizes(tensors, shapes)
    for more in (1, -1):
        changed = []
        for tensor, shape in zip(tensors, shapes, strict=True):
            for axis, size in enumerate(shape):
                if axis and isinstance(size, str) and size.isidentifier() and tensor.shape[axis] + more >= 2:
                    tensor = lengthened(tensor, axis, tensor.shape[axis] + more)
            changed.append(tensor)
        if any(new.shape != old.shape for new, old in zip(changed, tensors, strict=True)):
            yield tuple(changed)


def _within(tensors: Sequence[Tensor], bounds: Bounds) -> bool:
    return all(
        low <= size <= high
        for tensor, limits in zip(tensors, bounds, strict=False)
        for size, (low, high) in zip(tensor.shape, limits, strict=False)
    )
