"""Which axes of a file's inputs may vary, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_cco.export.deployed_forward import Deployed
from lightning_cco.export.errors import ExportError

Specification = dict[int, Any]
"""Axis → what `torch.export` is told of it: ``Dim.DYNAMIC``, ``Dim.AUTO`` or a ``Dim`` with a name."""


@dataclass
class Axes:
    """One way of tracing a model.

    Attributes:
        tensors: The inputs to trace with; torch.export takes an axis of size 1 for a constant, so the example's may have been doubled.
        specifications: Of each input, the axes that vary.
        names: What an axis is called, by number of the input and axis.
        sizes: What an axis after the batch is called if it varies: one that may be a length or a size.
    """

    tensors: tuple[Tensor, ...]
    specifications: list[Specification]
    names: dict[tuple[int, int], str] = field(default_factory=dict)
    sizes: dict[tuple[int, int], str] = field(default_factory=dict)


def ways_to_vary(
    deployed: Deployed,
    dynamic_batch: bool,
    options: Mapping[str, Any],
    input_names: Sequence[str],
    sizes: Mapping[tuple[int, int], str] | None = None,
) -> Iterator[Axes]:
    """Ways of tracing, the best first; the next is for when one fails.

    Args:
        deployed: The forward.
        dynamic_batch: Whether the first axis varies where the user says nothing.
        options: ``dynamic_shapes`` or ``dynamic_axes`` of the user.
        input_names: What the user calls the inputs.
        sizes: Names of the further axes that vary, by number of the input and axis, where the model allows it; then there is this one way.

    Raises:
        CCOError: The user names an axis or an input that does not exist.
    """
    tensors = deployed.example
    if options.get("dynamic_shapes") is not None:
        yield _asked(deployed, deployed.spread(options["dynamic_shapes"], "dynamic_shapes"))
        return
    if options.get("dynamic_axes") is not None:
        yield _asked(deployed, _of_axes(options["dynamic_axes"], deployed, input_names))
        return
    first = next((number for number, tensor in enumerate(tensors) if tensor.dim()), None)
    if not dynamic_batch or first is None:
        yield Axes(tensors, [{} for _ in tensors])
        return
    auto, dynamic = torch.export.Dim.AUTO, torch.export.Dim.DYNAMIC
    tensors = _doubled_batch(deployed, tensors, first)
    batch = [{0: dynamic if number == first else auto} if tensor.dim() else {} for number, tensor in enumerate(tensors)]
    time_first = _reads_time_first(deployed, tensors, first)
    names = dict.fromkeys(_batch_axes(deployed, tensors, first), "sequence" if time_first else "batch")
    if sizes:
        free: list[Specification] = [
            {**batch[number], **{axis: auto for axis in range(1, tensor.dim()) if (number, axis) in sizes and tensor.shape[axis] > 1}}
            for number, tensor in enumerate(tensors)
        ]
        yield Axes(tensors, free, names, {place: "batch" if time_first and place == (first, 1) else name for place, name in sizes.items()})
        return
    if time_first:
        size = tensors[first].shape[1]
        second: list[Specification] = [{1: auto} if tensor.dim() > 1 and tensor.shape[1] == size else {} for tensor in tensors]
        second[first] = {1: dynamic}
        yield Axes(tensors, second, {(first, 1): "batch"})
    yield Axes(tensors, batch, names)
    # Sequence first: its length is that of a mask's other axes too.
    size = tensors[first].shape[0]
    together = [{axis: auto for axis, length in enumerate(tensor.shape) if length == size} for tensor in tensors]
    together[first][0] = dynamic
    if sum(map(len, together)) > 1 and together != batch:
        yield Axes(tensors, together, {(first, 0): "length"})


def _of_axes(axes: Any, deployed: Deployed, input_names: Sequence[str]) -> list[Any]:
    """``dynamic_axes`` of the older exporter: input or output → axes, or axis → name."""
    if not isinstance(axes, Mapping):
        raise ExportError(f"dynamic_axes expects a mapping of input names to axes, got {type(axes).__name__}.")
    found: list[Any] = [None] * len(deployed.names)
    for name, entries in axes.items():
        named = dict(entries) if isinstance(entries, Mapping) else {axis: f"{name}_{axis}" for axis in entries}
        if name in input_names:
            found[list(input_names).index(name)] = named
        elif name in deployed.names:
            found[deployed.names.index(name)] = named
    return found


def check_axis_names(axes: Mapping[str, Any], inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Refuse ``dynamic_axes`` of what is neither an input nor an output.

    Raises:
        CCOError: With the names there are.
    """
    unknown = [name for name in axes if name not in (*inputs, *outputs)]
    if unknown:
        raise ExportError(f"dynamic_axes names {unknown}; the file's inputs are {list(inputs)}, its outputs {list(outputs)}.")


def _asked(deployed: Deployed, entries: list[Any]) -> Axes:
    """What the user says, with names as strings made into dimensions."""
    axes = Axes(deployed.example, [], {})
    for number, (entry, tensor) in enumerate(zip(entries, deployed.example, strict=True)):
        if isinstance(entry, (tuple, list)):
            entry = dict(enumerate(entry))
        if entry is not None and not isinstance(entry, Mapping):
            raise ExportError(
                f"the axes of '{deployed.names[number]}' are expected as {{axis: Dim or name}}, got {type(entry).__name__}: {entry!r}."
            )
        specification: Specification = {}
        for axis, size in (entry or {}).items():
            if not isinstance(axis, int) or not -tensor.dim() <= axis < tensor.dim():
                raise ExportError(
                    f"'{deployed.names[number]}' has {tensor.dim()} axes, of the sizes {tuple(tensor.shape)}; got axis {axis!r}."
                )
            axis %= tensor.dim()
            if size is None or size is torch.export.Dim.STATIC or (isinstance(size, int) and not isinstance(size, bool)):
                continue
            if isinstance(size, str):
                axes.names[number, axis] = size
                specification[axis] = torch.export.Dim.DYNAMIC
                continue
            if type(size) is torch.export.Dim:
                axes.names[number, axis] = size.__name__
                # A dimension by name must hold for every size; this one for those that the model takes, within the same limits.
                size = torch.export.Dim.DYNAMIC(min=size.min if size.min > 0 else None, max=size.max if size.max < 2**31 else None)
            specification[axis] = size
        axes.specifications.append(specification)
    # An axis of size 1 would be taken for a constant.
    doubled = [
        _doubled(tensor, [axis for axis in wanted if tensor.shape[axis] == 1])
        for tensor, wanted in zip(axes.tensors, axes.specifications, strict=True)
    ]
    if any(new is not old for new, old in zip(doubled, axes.tensors, strict=True)) and _runs(deployed, doubled):
        axes.tensors = tuple(doubled)
    return axes


def _doubled(tensor: Tensor, along: list[int]) -> Tensor:
    for axis in along:
        tensor = torch.cat([tensor, tensor], axis)
    return tensor


def _doubled_batch(deployed: Deployed, tensors: tuple[Tensor, ...], first: int) -> tuple[Tensor, ...]:
    """A batch of one sample as one of two; which of the other inputs have the batch for their first axis, the model says."""
    if tensors[first].shape[0] != 1:
        return tensors
    like = [number for number, tensor in enumerate(tensors) if tensor.dim() and tensor.shape[0] == 1]
    same = [number for number in like if tensors[number].dim() == tensors[first].dim()]
    for chosen in (like, same, [first]):
        doubled = tuple(_doubled(tensor, [0]) if number in chosen else tensor for number, tensor in enumerate(tensors))
        if _runs(deployed, doubled):
            return doubled
    return tensors


def _batch_axes(deployed: Deployed, tensors: tuple[Tensor, ...], first: int) -> list[tuple[int, int]]:
    """The first axes that must be as long as that of the first input: the model does not run if one of them alone stays as it is."""
    like = [number for number, tensor in enumerate(tensors) if tensor.dim() and tensor.shape[0] == tensors[first].shape[0]]
    mates = [first]
    for left in like[1:]:
        others = [_doubled(tensor, [0]) if number in like and number != left else tensor for number, tensor in enumerate(tensors)]
        # A mask of ones is left out by some models when they run, and not when they are traced: its shape tells.
        alike = tensors[left].dim() > 1 and tensors[left].shape[:2] == tensors[first].shape[:2]
        if alike or not _runs(deployed, others):
            mates.append(left)
    return [(number, 0) for number in mates]


def _is_time_first(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.RNNBase) and not module.batch_first


def _reads_time_first(deployed: Deployed, tensors: tuple[Tensor, ...], first: int) -> bool:
    """Whether the first two axes of the first input are time and batch, as a recurrent layer reads them."""
    found: list[bool] = []
    sizes = tensors[first].shape[:2]

    def look(module: torch.nn.Module, args: Any) -> None:
        read = args[0] if args else None
        found.append(isinstance(read, Tensor) and read.dim() == 3 and read.shape[:2] == sizes and sizes[0] != sizes[1])

    hooks = [module.register_forward_pre_hook(look) for module in deployed.modules() if _is_time_first(module)]
    try:
        return bool(hooks) and _runs(deployed, tensors) and any(found)
    finally:
        for hook in hooks:
            hook.remove()


def _runs(deployed: Deployed, tensors: Sequence[Tensor]) -> bool:
    try:
        deployed(*tensors)
    except Exception:  # these sizes do not fit together
        return False
    return True


def name_axes(graph: Any, axes: Axes) -> list[str]:
    """Call the sizes that vary what they are, everywhere in the graph.

    Returns:
        First axes of the inputs after the first, and sizes of images, that are fixed although they might have varied, in words.
    """
    called: dict[str, str] = {}
    fixed = []
    for wanted in (True, False):  # names that somebody chose come first
        for number, value in enumerate(graph.inputs):
            for axis, size in enumerate(value.shape or ()):
                symbol = getattr(size, "value", size)
                chosen = axes.names.get((number, axis))
                if isinstance(symbol, str) and symbol not in called and (chosen is not None) is wanted:
                    called[symbol] = chosen or _free_name(axes.sizes.get((number, axis)), f"{value.name}_{axis}", called)
                elif not wanted and isinstance(symbol, int) and axis in axes.specifications[number]:
                    fixed.append(f"axis {axis} of '{value.name}' is {symbol}")
    _rename(graph, called)
    return fixed


def _free_name(size: str | None, plain: str, called: Mapping[str, str]) -> str:
    if size is not None and size not in called.values():
        return size
    return plain if plain not in called.values() else f"{plain}_{len(called)}"


def _rename(graph: Any, called: Mapping[str, str]) -> None:
    import onnx_ir

    if not called:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, called)) + r")\b")
    for value in [*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is None:
            continue
        sizes = [size if isinstance(size, int) else getattr(size, "value", None) for size in value.shape]
        renamed = [pattern.sub(lambda match: called[match[1]], size) if isinstance(size, str) else size for size in sizes]
        if renamed != sizes:
            value.shape = onnx_ir.Shape(renamed)
