"""Which outputs a network ends with: its results, not the features on their way that it also gives.

Features are often given in another form than the network reads them: channels moved to the end, the last steps alone, a copy in a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from lightning_cco.graph.layer import Edge, Layer
from lightning_cco.graph.ops import Category, category_of

_Tensor = tuple[str, int]
"""A layer and which of its outputs."""

_REPEATING = frozenset({"expand", "repeat", "repeat_interleave", "interpolate", "pad"})
"""Kinds that give each value at least once where their result is the larger one: keys of which several heads of queries read each."""


def end_outputs(layers: Mapping[str, Layer], edges: Sequence[Edge]) -> list[str]:
    """Outputs that no layer of the network reads on; all of them if there is no such output.

    An output is read on if a layer that computes reads it, or what it was moved, sliced or copied from. Another part of what it was sliced from is not it.

    Args:
        layers: Layers by name, each after all that it reads.
        edges: Tensors between them.
    """
    reads: dict[str, list[_Tensor]] = {name: [] for name in layers}
    readers: dict[_Tensor, list[Layer]] = {}
    for edge in edges:
        reads[edge.destination].append((edge.source, edge.source_output))
        readers.setdefault((edge.source, edge.source_output), []).append(layers[edge.destination])
    read_on, read_whole = (_read_on(layers, readers, whole) for whole in (False, True))

    def goes_on(given: Sequence[_Tensor]) -> bool:
        pending, seen = [(tensor, False) for tensor in given], set[tuple[_Tensor, bool]]()
        while pending:
            tensor, cut = pending.pop()
            if (tensor, cut) in seen:
                continue
            seen.add((tensor, cut))
            if tensor in (read_whole if cut else read_on):
                return True
            maker = layers[tensor[0]]
            if _moves(maker):
                pending += [(before, cut or not _keeps_all(maker)) for before in reads[maker.name]]
        return False

    outputs = [name for name, layer in layers.items() if layer.kind == "output"]
    return [name for name in outputs if not goes_on(reads[name])] or outputs


def _read_on(layers: Mapping[str, Layer], readers: Mapping[_Tensor, Sequence[Layer]], whole: bool) -> set[_Tensor]:
    """Tensors that a layer computes something of, also after layers that move values; with ``whole`` only where these keep all values."""
    found: dict[str, set[int]] = {}
    for name in reversed(list(layers)):
        for number in range(max(1, len(layers[name].output_shapes))):
            for reader in readers.get((name, number), ()):
                if reader.kind == "output" or reader.beside:  # a check of values, or a loss, goes nowhere
                    continue
                if not _moves(reader) or (reader.name in found and (_keeps_all(reader) or not whole)):
                    found.setdefault(name, set()).add(number)
    return {(name, number) for name, numbers in found.items() for number in numbers}


def _moves(layer: Layer) -> bool:
    return layer.kind == "copy" or category_of(layer) in (Category.PRESERVE, Category.IDENTITY)


def _keeps_all(layer: Layer) -> bool:
    if not layer.input_shapes or len(layer.output_shapes) != 1:
        return False
    before, after = prod(layer.input_shapes[0]), prod(layer.output_shapes[0])
    return before == after or (layer.kind in _REPEATING and before < after)
