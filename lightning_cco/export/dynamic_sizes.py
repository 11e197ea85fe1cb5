"""Lengths of sequences and sizes of images that vary in a file: which, within which limits, and a batch of other sizes to check it on."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cco.errors import CCOError
from lightning_cco.export.deployed_forward import Deployed
from lightning_cco.export.engines import ENGINES
from lightning_cco.export.errors import BatchDoesNotVary, SizesDoNotVary, VaryingSizesCost, quoted
from lightning_cco.graph.snapshot import Snapshot
from lightning_cco.quantization.model import HookedModel

_IMAGES: Mapping[int, tuple[str, ...]] = {4: ("height", "width"), 5: ("depth", "height", "width")}
"""Names of the last axes of images and volumes, by the number of axes."""
_SCALES = (0.5, 2.0, 1.5)
_MOST_WAYS = 8
_MOST_OPERATIONS = 100
"""After one stride of 2 that pads as ``same`` does a size has 33 of them, after two more than 100 (EfficientNet-Lite0)."""

Sizes = dict[tuple[int, int], str]
"""Name of each axis that may vary, by the number of its input and the axis."""


def refuse_long_sizes(layer: str, values: Sequence[Any], most: int = _MOST_OPERATIONS) -> None:
    """Refuse sizes that have become long formulas of those of the inputs, while a model is traced.

    Padding that is worked out from the size (``same`` of TensorFlow) makes them longer with each layer of a stride, and torch.export compares all of them
    with each other: minutes, where it takes seconds with fixed sizes.

    Args:
        layer: The layer that gets the tensors.
        values: Arguments of its call.
        most: How many operations a size may have.

    Raises:
        VaryingSizesCost: A size has more.
    """
    for value in values:
        for size in value.shape if isinstance(value, Tensor) else ():
            if isinstance(size, torch.SymInt) and (operations := _operations(size.node.expr, most)) > most:
                raise VaryingSizesCost(
                    f"the sizes that layer '{layer}' gets are formulas of more than {operations - 1} operations, "
                    "which PyTorch's exporter would take minutes for"
                )


def _operations(expression: Any, most: int) -> int:
    """How many operations a formula has, counted up to one more than so many."""
    found, left = 0, [expression]
    while left and found <= most:
        parts = left.pop().args
        found += bool(parts)
        left += parts
    return found


def sizes_that_vary(quantized: HookedModel, deployed: Deployed) -> Sizes:
    """The axes after the batch along which the model takes other sizes, with the same calls as at those of the example; empty if there are none.

    Height and width of images, the length of ids. Of three axes the second or the third may be the length, of floats with two the second: what the model
    says. If not all of them vary together, those of texts alone or of images alone may: networks for both often take images of one size.
    """
    images: Sizes = {}
    ids: Sizes = {}
    lengths: list[list[tuple[int, int]]] = []
    for number, tensor in enumerate(deployed.example):
        if tensor.dim() in _IMAGES:
            names = _IMAGES[tensor.dim()]
            images |= {(number, tensor.dim() - len(names) + place): name for place, name in enumerate(names)}
        elif _has_sizes(tensor):
            ids[number, 1] = "sequence"
        elif tensor.dim() in (2, 3):
            lengths.append([(number, axis) for axis in range(1, tensor.dim())])
    texts = [ids | dict.fromkeys(chosen, "sequence") for chosen in itertools.islice(itertools.product(*lengths), _MOST_WAYS)]
    if lengths:
        texts.append(ids)
    ways = [*(images | text for text in texts), *texts, images]
    for sizes in (way for place, way in enumerate(ways) if way and way not in ways[:place]):
        shapes = [
            [sizes.get((number, axis), length) for axis, length in enumerate(tensor.shape)]
            for number, tensor in enumerate(deployed.example)
        ]
        if any(takes(quantized, deployed, tensors) for tensors in other_sizes(deployed.example, shapes)):
            return sizes
    return {}


def takes(quantized: HookedModel, deployed: nn.Module, tensors: Sequence[Tensor]) -> bool:
    """Whether the model runs on a batch, with no other calls than those captured; what it changes in itself for that batch is put back."""
    with quantized.runtime.mismatches.trial() as differences, Snapshot(quantized.model, parts=True):
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                deployed(*tensors)
            return not differences()
        except Exception:  # too short for it, or longer than its table of positions
            return False


def sizes_to_vary(quantized: HookedModel, deployed: Deployed, batch: bool, wanted: bool | None, check: bool) -> tuple[Sizes, str]:
    """Which sizes to let vary, and why none, where that is worth a word.

    Args:
        quantized: The model.
        deployed: The forward.
        batch: Whether the batch varies, and the user says nothing else of axes.
        wanted: What the user says of sizes.
        check: Whether the file is checked, so that it can be tried on others.
    """
    if not batch or wanted is False or not (wanted or check):
        return {}, ""
    engine = ENGINES[quantized.settings.deployment_settings.target_framework]
    if engine.fixed_sizes and not wanted and any(layer.kind == "conv" for layer in quantized.graph):
        return {}, fixed_since(engine.fixed_sizes)
    sizes = sizes_that_vary(quantized, deployed)
    if wanted and not sizes:
        raise SizesDoNotVary(
            f"dynamic_sizes=True, but {type(deployed.model).__name__} took no other sizes than the example's. Leave it out, or name what varies: "
            "dynamic_shapes={argument: {axis: name}}."
        )
    return sizes, _fixed_beside(sizes, deployed)


def _fixed_beside(sizes: Sizes, deployed: Deployed) -> str:
    """What is said where images and ids have sizes of the example; of other inputs nobody knows which axis might be a size."""
    varying = {number for number, _ in sizes}
    named = [
        f"{_axes_of(tensor)} of '{name}'"
        for number, (name, tensor) in enumerate(zip(deployed.names, deployed.example, strict=False))
        if _has_sizes(tensor) and number not in varying
    ]
    return f"fixed, since the model took no other sizes that were tried: {', '.join(named)}" if named else ""


def _axes_of(tensor: Tensor) -> str:
    """The axes that might be sizes, with their lengths: ``height and width [224, 224]``."""
    names = _IMAGES.get(tensor.dim(), ("sequence",))
    return f"{', '.join(names[:-1])}{' and ' if names[1:] else ''}{names[-1]} {list(tensor.shape[-len(names) :])}"


def _has_sizes(tensor: Tensor) -> bool:
    return tensor.dim() in _IMAGES or (tensor.dim() == 2 and not tensor.is_floating_point())


def fixed_since(why: str, could_vary: bool = True) -> str:
    """What the report says of sizes that do not vary, though they could, or that can't."""
    return f"the sizes of the example are fixed in the file: {why}" + ("; dynamic_sizes=True lets them vary" if could_vary else "")


class ExportAttempts:
    """Ways of writing a file, the best first: with all sizes that may vary, with the batch alone, with the sizes of the example.

    Args:
        sizes: The sizes other than the batch that may vary.
        batch: Whether the batch does; `None`: where the model allows it.
        at_any_price: Whether a file without these sizes is none.
        example: The tensors that the file takes.
        why: Why sizes other than the batch are fixed, all or some of them, if they are from the start.

    Attributes:
        why: What is to be said of sizes that do not vary.
        unvarying: What came of a batch that does, where it is fixed.
    """

    def __init__(self, sizes: Sizes, batch: bool | None, at_any_price: bool, example: Sequence[Tensor], why: str = "") -> None:
        self.why = why
        self.unvarying: CCOError | None = None
        self._may_fix_batch, self._example = batch is None and not (sizes and at_any_price), example
        self._left: list[tuple[Sizes, bool]] = [(sizes, batch is not False)]
        if sizes and not at_any_price:
            self._left.append(({}, batch is not False))

    def next(self) -> tuple[Sizes, bool]:
        """The sizes that are to vary now, and whether the batch is."""
        return self._left.pop(0)

    def failed(self, error: CCOError) -> None:
        """Note that the last way did not work; there is another one then.

        Raises:
            CCOError: There is none: what came of the last way; of a batch that varies, where none works without either.
        """
        if self.unvarying is not None:
            raise self.unvarying from self.unvarying.__cause__
        if self._left:
            self.why = fixed_since(short_reason(error), isinstance(error, VaryingSizesCost))
        elif self._may_fix_batch and isinstance(error, BatchDoesNotVary):
            self.unvarying, self.why = error, batch_fixed_since(self._example, error)
            self._left.append(({}, False))
        else:
            raise error


def batch_fixed_since(example: Sequence[Tensor], error: Exception) -> str:
    """What the report says, and a warning, of a batch that does not vary.

    Args:
        example: The tensors that the file takes.
        error: What came of a batch that does.
    """
    size = next((tensor.shape[0] for tensor in example if tensor.dim()), 1)
    return (
        f"the size of the batch is fixed in the file, at {size} as in the example, since no other could be written: {short_reason(error)}. Export with "
        "example_args of the size that will come, or let the model compute with x.shape[0] (not len(x), a number) as it is (dynamic_batch=True says more)"
    )


def short_reason(error: Exception) -> str:
    """The first sentence of an error."""
    return quoted(error).partition(". ")[0].partition("\n")[0].partition("! For more information")[0]


def limits_of(program: torch.export.ExportedProgram, names: Sequence[str]) -> dict[str, int]:
    """What limits the sizes that vary, in words: a table of positions has an end, a convolution reads at least as much as its kernel; and of which axis.

    Args:
        program: What was traced.
        names: Name of each input.
    """
    words: dict[str, int] = {}
    seen = set()
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in program.graph_signature.user_inputs]
    ranges = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
    for name, node in zip(names, placeholders, strict=False):
        for axis, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            bounds = ranges.get(str(size))
            if bounds is None or str(size) in seen:
                continue
            seen.add(str(size))
            least = f" {int(bounds.lower)} at least" if bounds.lower > 2 else ""
            most = f" {int(bounds.upper)} at most" if bounds.upper < 2**31 else ""
            if least or most:
                words[f"axis {axis} of '{name}'{least}{' and' if least and most else ''}{most}"] = axis
    return words


def other_sizes(tensors: Sequence[Tensor], shapes: Sequence[Sequence[Any]]) -> list[tuple[Tensor, ...]]:
    """A batch with other sizes along each axis after the batch that varies, in some ways: half, twice, one and a half times as long.

    Args:
        tensors: A batch.
        shapes: Of each of them, a number for an axis that is fixed, and a name for one that varies.
    """
    found = []
    for scale in _SCALES:
        changed = tuple(_resized(tensor, shape, scale) for tensor, shape in zip(tensors, shapes, strict=True))
        if any(new.shape != old.shape for new, old in zip(changed, tensors, strict=True)):
            found.append(changed)
    return found


def _resized(tensor: Tensor, shape: Sequence[Any], scale: float) -> Tensor:
    for axis, size in enumerate(shape):
        if axis and isinstance(size, str):
            length = int(tensor.shape[axis] * scale)
            if length >= 2:
                tensor = lengthened(tensor, axis, length)
    return tensor


def lengthened(tensor: Tensor, axis: int, length: int) -> Tensor:
    """A tensor with another size along an axis, repeated from its beginning.

    >>> lengthened(torch.tensor([[1, 2], [3, 4]]), 0, 3).tolist()
    [[1, 2], [3, 4], [1, 2]]
    """
    repeats = [1] * tensor.dim()
    repeats[axis] = -(-length // tensor.shape[axis])
    return tensor.repeat(repeats).narrow(axis, 0, length)
