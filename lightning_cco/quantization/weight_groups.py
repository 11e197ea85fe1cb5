"""Weights with a scale for each group of inputs, and with zero points: which layers can have them, and in which groups."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_cco._values import GROUP_SIZES
from lightning_cco.errors import CCOError
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.quantization.rules import BY_ITSELF, ResolvedRules
from lightning_cco.quantization.skip_reasons import Skip, SkipReason
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
    graph: LayerGraph, overall: GlobalQuantizationSettings, rules: Mapping[str, ResolvedRules], target: Target
) -> dict[str, int]:
    """The size of the groups of each layer whose weights are to be in groups that fit.

    Raises:
        CCOError: A rule names a layer itself that can't have them, or the engine can't.
    """
    found = {}
    for layer in graph:
        entry = rules.get(layer.name, ResolvedRules())
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


def wanted_zero_points(overall: GlobalQuantizationSettings, entry: ResolvedRules) -> bool:
    """Whether the settings want zero points for a layer's weights, whether they can have them or not."""
    symmetric = entry.weights_symmetric if entry.weights_symmetric is not None else overall.weights_symmetric
    return not symmetric


def find_with_zero_points(
    graph: LayerGraph, overall: GlobalQuantizationSettings, rules: Mapping[str, ResolvedRules], target: Target, skips: Mapping[str, Skip]
) -> set[str]:
    """The layers whose weights have zero points: those that are to, and whose weights alone are quantized.

    Args:
        graph: The layer graph.
        overall: What holds for all layers.
        rules: What the rules say of each.
        target: The engine.
        skips: Why layers are left in float, or have their weights alone quantized.

    Raises:
        CCOError: A rule names a layer itself that can't have them, or the engine can't.
    """
    found = set()
    for layer in graph:
        entry = rules.get(layer.name, ResolvedRules())
        if not wanted_zero_points(overall, entry):
            continue
        why = without_zero_points(layer, skips.get(layer.name), target)
        if not why and target.refuses_groups:
            raise CCOError(
                f"weights_symmetric: false with target_framework: {target.name}, which was not tried with zero points of weights. Leave weights_symmetric "
                "out, or choose target_framework: ort or openvino."
            )
        if not why:
            found.add(layer.name)
        elif entry.weights_symmetric is False and entry.symmetric_exactness >= BY_ITSELF:
            raise CCOError(f"layer_settings: {entry.symmetric_by} sets weights_symmetric: false, but {why}.")
    return found


def without_zero_points(layer: Layer, skip: Skip | None, target: Target) -> str:
    """Why a layer's weights can't have zero points, and what to write instead; empty if they can."""
    if grouped_inputs(layer) is None:
        return (
            f"layer '{layer.name}' (kind {layer.kind}) can't have zero points: expected a linear layer, a product with a matrix of weights on its right or an "
            "embedding. Leave weights_symmetric out for it, or write true"
        )
    if skip is None or skip.reason is not SkipReason.WEIGHT_ONLY:
        runs = (
            f"stays in float ({skip})"
            if skip is not None
            else f"runs in INT8 in {target.name}, whose products of integers want symmetric weights"
        )
        return f"layer '{layer.name}' {runs}. Write weights_group_size: 32 or weight_only: true for it, or weights_symmetric: true"
    if not fitting_groups(layer):
        return (
            f"layer '{layer.name}' has {grouped_inputs(layer)} inputs, and none of 16 to 256 divides them, as the blocks do in which engines multiply weights "
            "with zero points. Write weights_symmetric: true for it"
        )
    return ""


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
