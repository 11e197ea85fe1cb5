"""Rules of the settings that change nothing: said, since who wrote them expects that they do."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from lightning_cco.errors import CCOWarning
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.ops import Category, category_of
from lightning_cco.names import list_names
from lightning_cco.quantization.dynamic_activations import PRODUCTS, not_dynamic, wanted_dynamic
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.quantization.rules import ResolvedRules
from lightning_cco.quantization.skip_reasons import Skip, SkipReason
from lightning_cco.quantization.targets import TARGETS
from lightning_cco.quantization.weight_groups import grouped_inputs, misfit, wanted_group, wanted_zero_points, without_zero_points

_NO_OUTPUT = (Category.PRESERVE, Category.IDENTITY)


def warn_of_rules_without_effect(plan: QuantizationPlan, resolved: Mapping[str, ResolvedRules]) -> None:
    """Warn of each rule whose bits, groups or weights alone nothing has, with the reason, and of rules that leave the whole model in float.

    Bits change nothing where a layer has no weights, passes values on, or stays in float: in the tail, by another rule, since the engine computes it so.

    Args:
        plan: The plan.
        resolved: What the rules say of each layer.
    """
    said = [rule for rule in plan.settings.layer_settings if rule.by != "budget"]
    for rule in said:
        layers = [plan.graph[name] for name in plan.graph.select(rule.match)]
        if rule.weights_num_bits is not None and (why := _no_weights(plan, layers)):
            _warn(f"the rule '{rule.match}' sets weights_num_bits: {rule.weights_num_bits}, but {why}")
        elif rule.activations_num_bits is not None and (why := _no_activations(plan, layers)):
            _warn(f"the rule '{rule.match}' sets activations_num_bits: {rule.activations_num_bits}, but {why}")
        elif rule.weights_group_size and (why := _no_groups(plan, layers)):
            _warn(f"the rule '{rule.match}' sets weights_group_size: {rule.weights_group_size}, but {why}")
        elif rule.weight_only and (why := _not_alone(plan, layers)):
            _warn(f"the rule '{rule.match}' sets weight_only: true, but {why}")
        elif rule.weights_symmetric is False and (why := _no_zero_points(plan, layers)):
            _warn(f"the rule '{rule.match}' sets weights_symmetric: false, but {why}")
        elif rule.activations_dynamic and (why := _nothing_dynamic(plan, layers)):
            _warn(f"the rule '{rule.match}' sets activations_dynamic: true, but {why}")
    _warn_of_misfits(plan, resolved)
    _warn_of_symmetric(plan, resolved)
    _warn_of_static(plan, resolved)
    _warn_of_unstored(plan)
    others = (SkipReason.SUGGESTION, SkipReason.BUDGET)
    chosen = any(decision.reason in others for decision in plan.decisions.values())
    if not chosen and not plan.quantized and not plan.weight_only and any(rule.skip_quantization for rule in said):
        skipping = list_names([rule.match for rule in said if rule.skip_quantization])
        _warn(f"with the skips of {skipping} no layer is quantized: the model trains in float. Skip fewer layers")


def _no_weights(plan: QuantizationPlan, layers: Sequence[Layer]) -> str:
    """Why bits of weights change nothing; empty if they do."""
    weighted = [layer for layer in layers if layer.weighted]
    if not weighted:
        return f"no layer there has weights. Name one that has: {_names([layer for layer in plan.graph if layer.weighted])}"
    if any(plan.decisions[layer.name].weights_num_bits is not None or _suggested(plan, layer) for layer in weighted):
        return ""
    return f"{_stay(plan, weighted)}. {_WAY_OUT}"


def _no_activations(plan: QuantizationPlan, layers: Sequence[Layer]) -> str:
    """Why bits of outputs change nothing; empty if they do."""
    if all(category_of(layer) in _NO_OUTPUT for layer in layers):
        before = sorted({name for layer in layers for name in plan.graph.predecessors(layer.name)})
        return f"what it names only passes values on. Name the layer that makes them: {list_names(before)}"
    rounded = plan.output_bits()
    if any(plan.end_of_group(layer.name) in rounded or _suggested(plan, layer) for layer in layers):
        return ""
    in_float = [layer for layer in layers if layer.name not in plan.quantized]
    if in_float:
        return f"{_stay(plan, in_float)}, and no INT8 layer reads the result. {_WAY_OUT}"
    readers = [layer for layer in _readers(plan.graph, layers) if layer.kind != "output"]
    return f"no INT8 layer reads what {_names(layers)} make{'s' if len(layers) == 1 else ''}, so it is not rounded. Quantize what reads it: {_names(readers)}"


def _no_groups(plan: QuantizationPlan, layers: Sequence[Layer]) -> str:
    """Why a size of groups changes nothing; empty if it does, or if that is a matter of the size."""
    weighted = [layer for layer in layers if layer.weighted]
    able = [layer for layer in weighted if grouped_inputs(layer) is not None]
    if not able:
        ways = [layer for layer in plan.graph if grouped_inputs(layer) is not None]
        return (
            f"no linear layer, product with a matrix of weights or embedding is there. Name one: {_names(ways)}"
            if ways
            else misfit(layers[0])
        )
    if any(plan.decisions[layer.name].weights_num_bits is not None or _suggested(plan, layer) for layer in able):
        return ""
    return f"{_stay(plan, able)}. {_WAY_OUT}"


def _not_alone(plan: QuantizationPlan, layers: Sequence[Layer]) -> str:
    """Why layers do not have their weights alone quantized although a rule asks for it; empty if they do, or if another rule says otherwise."""
    weighted = [layer for layer in layers if layer.weighted]
    if not weighted:
        return f"no layer there has weights. Name one that has: {_names([layer for layer in plan.graph if layer.weighted])}"
    chosen = (SkipReason.SETTING, SkipReason.SUGGESTION, SkipReason.BUDGET)
    floats = [layer for layer in weighted if layer.name in plan.skipped and plan.decisions[layer.name].weights_num_bits is None]
    floats = [layer for layer in floats if plan.decisions[layer.name].reason not in chosen]
    if floats:
        return f"{_stay(plan, floats)}. Leave weight_only out for {'it' if len(floats) == 1 else 'them'}"
    others = [layer for layer in layers if layer.name in plan.quantized and not layer.weighted]
    others = [layer for layer in others if category_of(layer) not in _NO_OUTPUT and layer.kind != "input"]
    if others:
        have, run = ("has", "runs") if len(others) == 1 else ("have", "run")
        return f"{_names(others)} {have} no weights and {run} in INT8. To leave them in float, too, write skip_quantization: true for them"
    return ""


def _no_zero_points(plan: QuantizationPlan, layers: Sequence[Layer]) -> str:
    """Why no weight there can have zero points; empty if one can, of which `_warn_of_symmetric` tells."""
    able = [layer for layer in layers if grouped_inputs(layer) is not None]
    if any(plan.decisions[layer.name].weights_num_bits is not None or _suggested(plan, layer) for layer in able):
        return ""
    return f"{_stay(plan, able)}. {_WAY_OUT}" if able else _symmetric(plan, layers[0])


def _symmetric(plan: QuantizationPlan, layer: Layer) -> str:
    """Why a layer's weights have no zero points."""
    decision = plan.decisions[layer.name]
    skip = None if decision.reason is None else Skip(decision.reason, decision.detail)
    return without_zero_points(layer, skip, TARGETS[plan.settings.deployment_settings.target_framework])


def _nothing_dynamic(plan: QuantizationPlan, layers: Sequence[Layer]) -> str:
    """Why no layer there can round what it reads when it runs; empty if one can, of which `_warn_of_static` tells."""
    able = [layer for layer in layers if _is_product(layer)]
    if any(plan.decisions[layer.name].weights_num_bits is not None or _suggested(plan, layer) for layer in able):
        return ""
    return f"{_stay(plan, able)}. {_WAY_OUT}" if able else not_dynamic(layers[0])


def _is_product(layer: Layer) -> bool:
    return layer.kind in PRODUCTS and grouped_inputs(layer) is not None


def _warn_of_symmetric(plan: QuantizationPlan, resolved: Mapping[str, ResolvedRules]) -> None:
    """Warn of layers whose weights are to have zero points and can't; those of other kinds, such as convolutions, never have."""
    overall = plan.settings.global_quantization_settings
    found = [layer for layer in plan.graph if plan.decisions[layer.name].weights_num_bits is not None and grouped_inputs(layer) is not None]
    found = [layer for layer in found if wanted_zero_points(overall, resolved.get(layer.name, ResolvedRules()))]
    left = [layer for layer in found if plan.decisions[layer.name].weights_symmetric]
    if left:
        others = f" (so are those of {_names(left[1:])})" if len(left) > 1 else ""
        what = f"weights_symmetric: false, but {_symmetric(plan, left[0])}. Until then its weights are symmetric{others}."
        warnings.warn(what, CCOWarning, stacklevel=4)
    elif not overall.weights_symmetric and not found:
        warnings.warn(
            "weights_symmetric: false changes nothing: no linear layer, product with a matrix of weights or embedding is quantized.",
            CCOWarning,
            stacklevel=4,
        )


def _warn_of_static(plan: QuantizationPlan, resolved: Mapping[str, ResolvedRules]) -> None:
    """Warn of layers that are to round what they read when they run and can't, and where none does."""
    overall = plan.settings.global_quantization_settings
    quantized = [layer for layer in plan.graph if plan.decisions[layer.name].weights_num_bits is not None]
    wanted = [layer for layer in quantized if wanted_dynamic(overall, resolved.get(layer.name, ResolvedRules()))]
    left = [layer for layer in wanted if layer.name not in plan.dynamic and _is_product(layer)]
    if left:
        others = f" (so do {_names(left[1:])})" if len(left) > 1 else ""
        what = f"activations_dynamic: true, but {not_dynamic(left[0])}. Until then it goes without{others}."
        warnings.warn(what, CCOWarning, stacklevel=4)
    elif overall.activations_dynamic and not plan.dynamic:
        warnings.warn(
            "activations_dynamic: true changes nothing: no linear layer or product with a matrix of weights is quantized.",
            CCOWarning,
            stacklevel=4,
        )


def _warn_of_unstored(plan: QuantizationPlan) -> None:
    """Warn of layers with weights that stay in float since all weights are to be quantized alone, and the engine has no such products."""
    overall, target = plan.settings.global_quantization_settings, TARGETS[plan.settings.deployment_settings.target_framework]
    left = [layer for layer in plan.graph if layer.weighted and plan.decisions[layer.name].reason is SkipReason.ENGINE]
    left = [layer for layer in left if layer.kind in target.int8_kinds and not target.stores_weights(layer)]
    if overall.weight_only and left:
        warnings.warn(
            f"weight_only: true with target_framework: {target.name}, which multiplies no floats with integer weights: {_names(left)} "
            f"stay{'s' if len(left) == 1 else ''} in float. Leave weight_only out, so that they run in INT8, or choose target_framework: ort.",
            CCOWarning,
            stacklevel=4,
        )


def _warn_of_misfits(plan: QuantizationPlan, resolved: Mapping[str, ResolvedRules]) -> None:
    """Warn of layers whose weights can't be in groups of the size that is wanted, and where none could have any; convolutions and other kinds never have."""
    overall = plan.settings.global_quantization_settings
    found = [layer for layer in plan.graph if plan.decisions[layer.name].weights_num_bits is not None and grouped_inputs(layer) is not None]
    misfits = [
        layer
        for layer in found
        if plan.decisions[layer.name].weights_group_size is None
        and wanted_group(overall, resolved.get(layer.name, ResolvedRules())) is not None
    ]
    if misfits:
        what = f"weights_group_size: {wanted_group(overall, resolved.get(misfits[0].name, ResolvedRules()))}, but {misfit(misfits[0])}"
        others = f" (so have {_names(misfits[1:])})" if len(misfits) > 1 else ""
        warnings.warn(f"{what}. Until then it has one scale for each channel{others}.", CCOWarning, stacklevel=4)
    elif overall.weights_group_size and not found:
        warnings.warn(
            f"weights_group_size: {overall.weights_group_size} changes nothing: no linear layer, product with a matrix of weights or embedding is quantized.",
            CCOWarning,
            stacklevel=4,
        )


def _suggested(plan: QuantizationPlan, layer: Layer) -> bool:
    """Whether a layer is in float because a measurement said so, which is said elsewhere."""
    return plan.decisions[layer.name].reason is SkipReason.SUGGESTION


_WAY_OUT = "Quantize the layer by a rule with skip_quantization: false if its engine can, or leave the bits out"


def _readers(graph: LayerGraph, layers: Sequence[Layer]) -> list[Layer]:
    return [graph[name] for name in dict.fromkeys(name for layer in layers for name in graph.successors(layer.name))]


def _stay(plan: QuantizationPlan, layers: Sequence[Layer]) -> str:
    reasons = dict.fromkeys(plan.skipped[layer.name] for layer in layers if layer.name in plan.skipped)
    return f"{_names(layers)} stay{'s' if len(layers) == 1 else ''} in float ({'; '.join(list(reasons)[:3])})"


def _names(layers: Sequence[Layer]) -> str:
    return list_names([layer.name for layer in layers])


def _warn(what: str) -> None:
    warnings.warn(f"layer_settings: {what}.", CCOWarning, stacklevel=4)
