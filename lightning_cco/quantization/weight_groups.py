"""Weights with a scale for each group of inputs: which layers can have them, and in which groups."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_cco._values import GROUP_SIZES
from lightning_cco.errors import CCOError
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.quantization.rules import BY_ITSELF, ResolvedRules
from lightning_cco.quantization.targets import Target
from lightning_cco.settings import GlobalQuantizationSettings


def grouped_inputs(layer: Layer) -> int | None:
    """How many weights an output of a layer is made of, in the order in which they are cut into groups; `None`: the layer can't have groups.

    They are a linear layer's input features, and an embedding's columns.
    """
    if not layer.weighted or layer.note:
        return None
    if layer.kind == "linear" and layer.input_shapes:
        return layer.input_shapes[-1][-1]
    if layer.kind in ("embedding", "embedding_bag"):
        return layer.output_shapes[0][-1]
    shape = layer.attributes.get("operand_shape")
    if layer.kind in ("matmul", "addmm") and not layer.attributes.get("weight_first") and isinstance(shape, tuple) and len(shape) == 2:
        return int(shape[0])
    return None


def fitting_groups(layer: Layer) -> list[int]:
    """The sizes of groups that divide the inputs of a layer."""
    inputs = grouped_inputs(layer)
    return [size for size in GROUP_SIZES if inputs and inputs % size == 0]


def wanted_group(overall: GlobalQuantizationSettings, entry: ResolvedRules) -> int | None:
    """The size of groups that the settings want for a layer, whether it fits or not."""
    if entry.weight_only is False and entry.weight_only_exactness >= entry.groups_exactness:
        return None
    return (entry.weights_group_size if entry.weights_group_size is not None else overall.weights_group_size) or None


def find_weight_groups(
    graph: LayerGraph, overall: GlobalQuantizationSettings, said: Mapping[str, ResolvedRules], target: Target
) -> dict[str, int]:
    """The size of the groups of each layer whose weights are to be in groups that fit.

    Raises:
        CCOError: A rule names a layer itself that can't have them, or the engine can't.
    """
    found = {}
    for layer in graph:
        entry = said.get(layer.name, ResolvedRules())
        size = wanted_group(overall, entry)
        if size is None:
            continue
        sizes = fitting_groups(layer)
        if size in sizes:
            if target.refuses_groups:
                raise CCOError(f"weights_group_size: {size} with target_framework: {target.name}, which {target.refuses_groups}.")
            found[layer.name] = size
        elif entry.weights_group_size and entry.groups_exactness >= BY_ITSELF:
            raise CCOError(f"layer_settings: {entry.groups_by} sets weights_group_size: {size}, but {misfit(layer)}.")
    return found


def misfit(layer: Layer) -> str:
    """Why a layer's weights can't be in groups of the wanted size, and what to write instead."""
    inputs, sizes = grouped_inputs(layer), fitting_groups(layer)
    if inputs is None:
        return (
            f"layer '{layer.name}' (kind {layer.kind}) can't have groups: a linear layer, a product with a matrix of weights on its right or an embedding was "
            "expected. Leave weights_group_size out for it, or write 0"
        )
    fits = (
        f"{' and '.join(map(str, sizes))} divide{'s' if len(sizes) == 1 else ''} them. Write {sizes[-1]}, or"
        if sizes
        else "none of 16 to 256 divides them. Write"
    )
    return f"layer '{layer.name}' has {inputs} inputs, and {fits} 0 for one scale for each channel"
