"""What is left in float by settings, kind and engine; `int8_layers`, `groups` and `residual_stream` add what follows from neighbours."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lightning_cco.errors import CCOError
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.ops import Category, category_of, is_known_kind
from lightning_cco.names import list_names
from lightning_cco.quantization.rules import BY_BUDGET, BY_ITSELF, ResolvedRules
from lightning_cco.quantization.skip_reasons import Skip, SkipReason
from lightning_cco.quantization.targets import Target
from lightning_cco.settings import Settings

_UNSEEN = {
    "cast": "it makes floats of integers or complex numbers, which the layers that read them quantize",
    "written": "it was written to through views, and the layers that read it quantize it",
    "unseen": "no torch function was seen to make it (TorchScript, NumPy, random numbers); the layers that read it quantize it",
}


def _category(layer: Layer) -> Category:
    return category_of(layer)


# Why a layer can't run in INT8, whatever its engine; the first that holds.


def _marks_an_output(layer: Layer) -> Skip | None:
    return Skip(SkipReason.OUTPUT, "it only marks where the model returns a tensor") if layer.kind == "output" else None


def _has_integers(layer: Layer) -> Skip | None:
    what = "its values are integers (indices or counts)" if layer.kind == "input" else "it computes integers"
    return Skip(SkipReason.INTEGER, f"{what}, which are never quantized") if layer.note == "integer" else None


def _has_a_note(layer: Layer) -> Skip | None:
    return Skip(SkipReason.UNSUPPORTED, layer.note) if layer.note else None


def _is_frozen(layer: Layer) -> Skip | None:
    return Skip(SkipReason.ENGINE, f"'{layer.frozen}' is frozen and only asked in training, without gradients") if layer.frozen else None


def _is_between_modules(layer: Layer) -> Skip | None:
    what = "the step computes it between the modules that it calls, where nothing is rounded; the layers that read it quantize it"
    return Skip(SkipReason.UNSUPPORTED, what) if layer.outside and _category(layer) is not Category.PRESERVE else None


def _is_beside(layer: Layer) -> Skip | None:
    what = "no output depends on it, nor a layer with weights: it is used for a loss, a statistic, or what is logged or kept"
    return Skip(SkipReason.ENGINE, what) if layer.beside and not layer.weighted else None


def _is_dropout(layer: Layer) -> Skip | None:
    return Skip(SkipReason.ENGINE, "dropout is not part of the deployed model") if _category(layer) is Category.IDENTITY else None


_WHATEVER_THE_ENGINE = (_marks_an_output, _has_integers, _has_a_note, _is_frozen, _is_between_modules, _is_beside, _is_dropout)


def _in_float(layer: Layer, target: Target) -> Skip:
    """Why an engine computes a layer in float."""
    if target.stores_weights(layer):
        return Skip(SkipReason.WEIGHT_ONLY, f"{target.name} computes it in float, from weights that are stored as integers")
    if layer.kind in _UNSEEN:
        return Skip(SkipReason.ENGINE, _UNSEEN[layer.kind])
    if layer.kind == "batch_norm":
        return Skip(SkipReason.ENGINE, "batch norm runs in INT8 only where it folds into the quantized layer before it")
    if is_known_kind(layer.kind):
        arguments = " with these arguments" if layer.kind in target.int8_kinds else ""
        return Skip(SkipReason.ENGINE, f"{layer.kind}{arguments} is computed in float by {target.name}")
    return Skip(SkipReason.UNSUPPORTED, f"{layer.kind} has no INT8 kernel here")


def _intrinsic(layer: Layer, target: Target) -> Skip | None:
    """Why a layer can't run in INT8 whatever the settings say; `None` if it can."""
    for why in _WHATEVER_THE_ENGINE:
        if (skip := why(layer)) is not None:
            return skip
    if _category(layer) is Category.PRESERVE or layer.kind == "input" or target.computes_in_int8(layer):
        return None
    return _in_float(layer, target)


def find_skips(
    graph: LayerGraph,
    settings: Settings,
    rules: dict[str, ResolvedRules],
    suggestions: Collection[str],
    target: Target,
    groups: Mapping[str, int],
    dynamic: Mapping[str, int],
) -> tuple[dict[str, Skip], frozenset[str]]:
    """Find what is not to be quantized.

    Args:
        graph: The layer graph.
        settings: The recipe.
        rules: What its rules say of each layer.
        suggestions: Layers to skip because of their sensitivity.
        target: The engine.
        groups: Layers whose weights are in groups, which no engine multiplies in INT8 with tensors of one scale, and how many are in one.
        dynamic: Layers that round what they read when they run, and in blocks of how many values.

    Returns:
        The reason of every layer that is left in float; and the layers that are not only because a rule asks for them by name.

    Raises:
        CCOError: A rule asks for something impossible.
    """
    overall = settings.global_quantization_settings
    tail = graph.tail() if overall.skip_tail_quantization else set()
    skips: dict[str, Skip] = {}
    forced = set()
    for layer in graph:
        entry, intrinsic = rules.get(layer.name, ResolvedRules()), _intrinsic(layer, target)
        if entry.asked_for:
            _refuse_impossible(graph, layer, entry, intrinsic)
            alone = (
                layer.name in groups or layer.name in dynamic or (overall.weight_only and layer.weighted and entry.weight_only is not False)
            )
            if _runs_if_asked(layer, intrinsic, target) and not alone:
                forced.add(layer.name)
                continue
        if entry.weight_only and (skip := _weights_alone(layer, entry, intrinsic, target)) is not None:
            skips[layer.name] = skip
            continue
        skip = _chosen(layer, entry, intrinsic, layer.name in suggestions, layer.name in tail)
        if skip is None:
            skip = _alone_when_it_runs(layer, dynamic.get(layer.name), target)
        if skip is None:
            skip = _alone_by_settings(layer, entry, overall.weight_only, groups.get(layer.name), target)
        if skip is not None and skip.reason is SkipReason.SUGGESTION and overall.automatic_skip_by == "loss":
            skip = Skip(SkipReason.SUGGESTION, "its expected rise of the loss was above the threshold")
        if skip is not None:
            skips[layer.name] = skip
    return skips, frozenset(forced)


def _refuse_impossible(graph: LayerGraph, layer: Layer, entry: ResolvedRules, intrinsic: Skip | None) -> None:
    impossible = (SkipReason.INTEGER, SkipReason.UNSUPPORTED, SkipReason.OUTPUT)
    if intrinsic is not None and (intrinsic.reason in impossible or _category(layer) is Category.IDENTITY):
        raise CCOError(
            f"layer_settings: {entry.skip_by} asks to quantize layer '{layer.name}' (kind {layer.kind}), which is impossible: {intrinsic.detail}. "
            f"Remove skip_quantization: false{_instead(graph, layer)}."
        )


def _runs_if_asked(layer: Layer, intrinsic: Skip | None, target: Target) -> bool:
    """Whether a layer runs in INT8 if a rule asks for it by name, and may not otherwise."""
    if intrinsic is None:
        return layer.kind in target.elementwise_kinds or _category(layer) is Category.CLAMP
    return intrinsic.reason in (SkipReason.ENGINE, SkipReason.WEIGHT_ONLY)


def _weights_alone(layer: Layer, entry: ResolvedRules, intrinsic: Skip | None, target: Target) -> Skip | None:
    """That a layer has its weights alone quantized, since a rule asks for it; `None` if a rule that skips it wins, or it stays in float anyway."""
    if entry.skip and entry.skip_exactness >= entry.weight_only_exactness:
        return None
    if intrinsic is not None and (intrinsic.reason is not SkipReason.WEIGHT_ONLY) and layer.weighted:
        return None
    if target.stores_weights(layer):
        return Skip(SkipReason.WEIGHT_ONLY, f"weight_only: true from {entry.weight_only_by}", by_setting=True)
    if entry.weight_only_exactness >= BY_ITSELF and entry.weight_only_by != BY_BUDGET:
        raise CCOError(
            f"layer_settings: {entry.weight_only_by} asks for weight_only: true of layer '{layer.name}' (kind {layer.kind}), but {target.name} can't store its "
            "weights as integers, or it has none. Name a layer with weights, such as a convolution or a linear layer."
        )
    return None


def _alone_when_it_runs(layer: Layer, block: int | None, target: Target) -> Skip | None:
    """That a layer which could run in INT8 rounds what it reads when it runs; `None`: it does not."""
    if block is None or not target.stores_weights(layer):
        return None
    return Skip(SkipReason.WEIGHT_ONLY, f"what it reads is rounded to 8 bits when it runs, with a scale for each {block} values of a row")


def _alone_by_settings(layer: Layer, entry: ResolvedRules, overall: bool, group: int | None, target: Target) -> Skip | None:
    """That a layer which could run in INT8 has its weights alone quantized, or stays in float, by what holds for all layers; `None`: it runs in INT8."""
    if group is not None and target.stores_weights(layer):
        return Skip(SkipReason.WEIGHT_ONLY, f"{target.name} multiplies weights in groups of {group} in float")
    if not overall or entry.weight_only is False:
        return None
    if target.stores_weights(layer):
        return Skip(SkipReason.WEIGHT_ONLY, "weight_only: true for all layers", by_setting=True)
    if _category(layer) is Category.PRESERVE or layer.kind == "input" or entry.skip is False:
        return None
    if layer.weighted:
        return Skip(SkipReason.ENGINE, f"weight_only: true for all layers, and {target.name} multiplies no floats with integer weights")
    return Skip(SkipReason.ENGINE, "weight_only: true for all layers, and it has no weights")


def _chosen(layer: Layer, entry: ResolvedRules, intrinsic: Skip | None, suggested: bool, in_tail: bool) -> Skip | None:
    """Why a layer is left in float; `None` if it is not."""
    unwanted = entry.skip or (entry.skip is None and suggested)
    if intrinsic is not None:
        # A batch norm would be pulled into the group of its convolution otherwise; the weights of a layer in float can be left in float, too.
        of_norm = layer.kind == "batch_norm" and unwanted
        of_weights = intrinsic.reason is SkipReason.WEIGHT_ONLY and (unwanted or in_tail)
        if not of_norm and not of_weights:
            return intrinsic
    if entry.skip and entry.skip_by == BY_BUDGET:
        return Skip(SkipReason.BUDGET, "the accuracy that it saves is worth what it costs of the budget")
    if entry.skip:
        return Skip(SkipReason.SETTING, f"skip_quantization: true from {entry.skip_by}")
    if entry.skip is False:
        return None
    if suggested:
        return Skip(SkipReason.SUGGESTION, "its Quantization Sensitivity was above the threshold")
    return Skip(SkipReason.TAIL, "the last layer with weights before an output, or after it") if in_tail else None


def _instead(graph: LayerGraph, layer: Layer) -> str:
    if layer.kind == "output":
        return f"; to quantize what makes it, name that layer: {list_names(graph.predecessors(layer.name))}"
    readers = [name for name in graph.successors(layer.name) if graph[name].kind != "output"]
    return f"; to quantize what reads it, name that layer: {list_names(readers)}" if readers else ""
