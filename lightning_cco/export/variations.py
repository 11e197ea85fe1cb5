"""Further batches for a check, made of those that are given: values and ids that were not seen in them, within the ranges that were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_cco.export.feeds import ForwardArguments
from lightning_cco.graph.containers import tensors_in
from lightning_cco.quantization.model import HookedModel

_MOST = 2


def varied(quantized: HookedModel, calls: Sequence[ForwardArguments]) -> list[ForwardArguments]:
    """A variation of each of the first two batches.

    Floats are reversed along their last axis and brought further from their mean, within the range of the batch; ids are drawn anew, from the whole
    table where they are only looked up. Flags, masks of 0 and 1, and vectors of integers (lengths) stay as they are.
    """
    generator = torch.Generator().manual_seed(0)
    rows = _rows(quantized)
    found = []
    for args, kwargs in calls[:_MOST]:
        position = iter(range(len(tensors_in([args, kwargs]))))

        def vary(tensor: Tensor, position: Any = position) -> Tensor:
            return _varied(tensor, rows.get(next(position)), generator)

        found.append((_mapped(args, vary), _mapped(kwargs, vary)))
    return found


def _varied(tensor: Tensor, rows: int | None, generator: torch.Generator) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_floating_point():
        if tensor.dim() < 2 or not tensor.numel() or not bool(torch.isfinite(tensor).all()):
            return tensor
        # Twice the contrast: what ranges clamp is then clamped somewhere.
        return torch.lerp(tensor.mean(), tensor, 2.0).clamp(tensor.min(), tensor.max()).flip(-1)
    if tensor.dtype is torch.bool or tensor.is_complex() or tensor.dim() < 2 or not tensor.numel():
        return tensor
    low, high = int(tensor.min()), int(tensor.max())
    if rows is not None:
        low, high = 0, rows - 1
    elif low >= 0 and high <= 1:
        return tensor
    return torch.randint(low, high + 1, tensor.shape, generator=generator).to(tensor)


def _rows(quantized: HookedModel) -> dict[int, int]:
    """Rows of the smallest table that an input is looked up in, by the input's number, if nothing else reads it."""
    graph = quantized.graph
    parameters = dict(quantized.model.named_parameters(remove_duplicate=False))
    found = {}
    for number, layer in enumerate(entry for entry in graph if entry.kind == "input"):
        readers = [graph[name] for name in graph.successors(layer.name)]
        names = [reader.parameters[0] for reader in readers if reader.kind == "embedding" and reader.parameters]
        tables = [parameters[name] for name in names if name in parameters]  # adapters that are merged after the training leave others
        if readers and len(tables) == len(readers):
            found[number] = min(len(table) for table in tables)
    return found


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
