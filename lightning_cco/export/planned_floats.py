"""Which layers that are planned in INT8 an engine computes in float, by the operators that it says it executes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_cco.export.island_kinds import FloatIsland, IslandKind
from lightning_cco.graph.ops import Category, category_of, operation_of_kind
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.tensor_key import TensorKey

_COMPUTING = frozenset({Category.WEIGHTED, Category.MATMUL, Category.CLAMP, Category.COMPUTE})


@dataclass(frozen=True)
class Executed:
    """An operator that an engine executes, and that computes.

    Attributes:
        operator: What the engine calls it.
        layers: The layers that went into it, as far as known.
        on_integers: Whether it computes on integers; else on floats.
    """

    operator: str
    layers: tuple[str, ...]
    on_integers: bool


def planned_to_compute(quantized: HookedModel) -> set[str]:
    """Layers that are planned in INT8 and compute: what only moves values is as its tensor is, and of a model's input there is nothing to compute."""
    planned = quantized.plan.quantized
    return {layer.name for layer in quantized.graph if layer.name in planned and layer.kind != "input" and category_of(layer) in _COMPUTING}


def planned_floats(quantized: HookedModel, executed: Sequence[Executed], engine: str) -> list[FloatIsland]:
    """Layers that are planned in INT8 and that an engine computes in float.

    A part of a layer may be in float where another one is not, such as the bias of a product. Rows of a table are looked up as integers, and dequantized.

    Args:
        quantized: The model.
        executed: What the engine executes.
        engine: What the engine is called.
    """
    in_integers = {layer for entry in executed if entry.on_integers for layer in entry.layers}
    wanted = {name for name in planned_to_compute(quantized) - in_integers if not operation_of_kind(quantized.graph[name].kind).looks_up}
    found: dict[str, str] = {}
    for entry in executed:
        for layer in entry.layers:
            if layer in wanted and not entry.on_integers:
                found.setdefault(layer, entry.operator)
    islands = []
    for layer, operator in found.items():
        without = without_range(quantized, layer)
        kind = IslandKind.NO_RANGE if without else IslandKind.UNPLANNED
        islands.append(FloatIsland(operator, (layer,), without or f"planned in INT8, but {engine} computes it in float", kind))
    return islands


def without_range(quantized: HookedModel, layer: str) -> str:
    """Why a layer reads or makes a tensor that is not rounded though it is planned to be: nothing has come there (an expert that no token went to)."""
    plan = quantized.plan
    made = [TensorKey(edge.source, edge.source_output) for edge in quantized.graph.edges if edge.destination == layer]
    keys = [*plan.reads.get(layer, {}).values(), *(plan.origins.get(key, key) for key in made), TensorKey(layer)]
    empty = [str(key) for key in keys if key in quantized.activations and quantized.activations[key].empty]
    return f"'{empty[0]}' has no range, since nothing came there in calibration and training" if empty else ""
