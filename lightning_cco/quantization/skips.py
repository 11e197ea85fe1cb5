"""Which layers are left in float, and why."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.ops import Category, is_known_kind, operation_of_kind
from lightning_cco.names import list_names
from lightning_cco.quantization.rules import Said
from lightning_cco.quantization.targets import Target
from lightning_cco.settings import LayerRule, Settings

WEIGHT_ONLY = "weight-only"
"""Reason of a layer that is computed in float from integer weights."""

_UNSEEN = {
    "cast": "it makes floats of integers or complex numbers, which the layers that read them quantize",
    "written": "it was written to through views, and the layers that read it quantize it",
    "unseen": "no torch function was seen to make it (TorchScript, NumPy, random numbers); the layers that read it quantize it",
}


def _intrinsic(layer: Layer, target: Target) -> tuple[str, str]:
    """Why a layer can't run in INT8 whatever the settings say; two empty texts if it can."""
    category = operation_of_kind(layer.kind).category
    if layer.kind == "output":
        return "output", "it only marks where the model returns a tensor"
    if layer.note == "integer":
        what = "its values are integers (indices or counts)" if layer.kind == "input" else "it computes integers"
        return "integer", f"{what}, which are never quantized"
    if layer.note:
        return "unsupported", layer.note
    if layer.frozen:
        return "rule", f"'{layer.frozen}' is frozen and only asked in training, without gradients"
    if layer.outside and category is not Category.PRESERVE:
        return (
            "unsupported",
            "the step computes it between the modules that it calls, where nothing is rounded; the layers that read it quantize it",
        )
    if category is Category.IDENTITY:
        return "rule", "dropout is not part of the deployed model"
    if category is Category.PRESERVE or layer.kind == "input":
        return "", ""
    if target.computes_in_int8(layer):
        return "", ""
    if target.stores_weights(layer):
        return WEIGHT_ONLY, f"{target.name} computes it in float, from weights that are stored as integers"
    if layer.kind in _UNSEEN:
        return "rule", _UNSEEN[layer.kind]
    if layer.kind == "batch_norm":
        return "rule", "batch norm runs in INT8 only where it folds into the quantized layer before it"
    if is_known_kind(layer.kind):
        form = " of this form" if layer.kind in target.int8_kinds else ""
        return "rule", f"{layer.kind}{form} is computed in float by {target.name}"
    return "unsupported", f"{layer.kind} has no INT8 form here"


def find_skips(
    graph: LayerGraph, settings: Settings, said: dict[str, Said], suggestions: Collection[str], target: Target
) -> tuple[dict[str, tuple[str, str]], frozenset[str]]:
    """Find what is not to be quantized.

    Args:
        graph: The layer graph.
        settings: The recipe.
        said: What its rules say of each layer.
        suggestions: Layers to skip because of their sensitivity.
        target: The engine.

    Returns:
        Reason and detail for every layer that is left in float; and the layers that are not only because a rule asks for them by name.

    Raises:
        CCOError: A rule asks for something impossible.
    """
    tail = graph.tail() if settings.global_quantization_settings.skip_tail_quantization else set()
    skips: dict[str, tuple[str, str]] = {}
    forced = set()
    for layer in graph:
        entry = said.get(layer.name, Said())
        reason, detail = _intrinsic(layer, target)
        asked = entry.asked_for
        if asked and (reason in ("integer", "unsupported", "output") or operation_of_kind(layer.kind).category is Category.IDENTITY):
            raise CCOError(
                f"layer_settings: {entry.skip_by} asks to quantize layer '{layer.name}' (kind {layer.kind}), which is impossible: {detail}. "
                f"Remove skip_quantization: false{_instead(graph, layer)}."
            )
        follows = layer.kind in target.followers or operation_of_kind(layer.kind).category is Category.CLAMP
        if asked and (reason in ("rule", WEIGHT_ONLY) or (not reason and follows)):
            forced.add(layer.name)
            continue
        unwanted = entry.skip or (entry.skip is None and layer.name in suggestions)
        # A batch norm would be pulled into the group of its convolution otherwise; the weights of a layer in float can be left in float, too.
        if reason and not ((unwanted and layer.kind == "batch_norm") or (reason == WEIGHT_ONLY and (unwanted or layer.name in tail))):
            skips[layer.name] = (reason, detail)
        elif entry.skip:
            skips[layer.name] = ("setting", f"skip_quantization: true from {entry.skip_by}")
        elif entry.skip is False:
            continue
        elif layer.name in suggestions:
            skips[layer.name] = ("suggestion", "its Quantization Sensitivity was above the threshold")
        elif layer.name in tail:
            skips[layer.name] = ("tail", "between an output and the last weighted layer before it")
    return skips, frozenset(forced)


def warn_of_bits_for_nothing(graph: LayerGraph, rules: Sequence[LayerRule]) -> None:
    """Say of a rule that it sets bits of what none of its layers has."""
    no_output = (Category.PRESERVE, Category.IDENTITY)
    for rule in rules:
        if rule.weights_num_bits is None and rule.activations_num_bits is None:
            continue
        layers = [graph[name] for name in graph.select(rule.match)]
        missing = ""
        if rule.weights_num_bits is not None and not any(layer.weighted for layer in layers):
            some = list_names([layer.name for layer in graph if layer.weighted])
            missing = f"weights_num_bits: {rule.weights_num_bits}, but no layer there has weights. Name one that has: {some}"
        elif rule.activations_num_bits is not None and all(operation_of_kind(layer.kind).category in no_output for layer in layers):
            missing = (
                f"activations_num_bits: {rule.activations_num_bits}, but what it names only passes values on. "
                f"Name the layer that makes them: {list_names(sorted({before for layer in layers for before in graph.predecessors(layer.name)}))}"
            )
        if missing:
            warnings.warn(f"layer_settings: the rule '{rule.match}' sets {missing}.", CCOWarning, stacklevel=3)


def _instead(graph: LayerGraph, layer: Layer) -> str:
    if layer.kind == "output":
        return f"; to quantize what makes it, name that layer: {list_names(graph.predecessors(layer.name))}"
    readers = [name for name in graph.successors(layer.name) if graph[name].kind != "output"]
    return f"; to quantize what reads it, name that layer: {list_names(readers)}" if readers else ""
