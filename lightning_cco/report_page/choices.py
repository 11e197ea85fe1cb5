"""What a reader of the page can change of each layer, and the rules that the recipe has already."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from lightning_cco.errors import CCOError
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.ops import Category, category_of
from lightning_cco.names import yaml_value
from lightning_cco.quantization.plan import QuantizationPlan, packs_weights
from lightning_cco.quantization.planner import plan_quantization
from lightning_cco.quantization.rules import ResolvedRules, apply_rules
from lightning_cco.quantization.skip_reasons import SkipReason
from lightning_cco.quantization.targets import TARGETS
from lightning_cco.quantization.tensor_key import TensorKey
from lightning_cco.settings import BudgetSettings, LayerRule, load_settings

BITS = (2, 3, 4, 5, 6, 7, 8)
_MAY_COME_BACK = (SkipReason.TAIL, SkipReason.SETTING, SkipReason.SUGGESTION, SkipReason.BUDGET)


def choices(plan: QuantizationPlan) -> dict[str, dict[str, Any]]:
    """What can be changed of each layer of a plan by a rule with its name.

    Returns:
        By layer, where there is something: ``float``: it can be left in float; ``int8``: it is in float and can run in integers; ``weights``: numbers of
        bits for its weights; ``outputs``: whether the bits of its output can be changed.
    """
    target = TARGETS[plan.settings.deployment_settings.target_framework]
    vnni = plan.settings.deployment_settings.vnni
    comes_back = _comes_back(plan)
    found = {}
    for layer in plan.graph:
        runs = layer.name in plan.quantized or layer.name in plan.weight_only
        entry: dict[str, Any] = {}
        if runs and layer.kind != "input" and category_of(layer) not in (Category.PRESERVE, Category.IDENTITY):
            entry["float"] = True
        if layer.name in comes_back:
            entry["int8"] = True
        if layer.weighted and (runs or layer.name in comes_back):
            entry["weights"] = [bits for bits in BITS if target.weight_bits(layer, bits, vnni) == bits]
        if TensorKey(layer.name) in plan.tensors:
            entry["outputs"] = True
        if entry:
            found[layer.name] = entry
    return found


def _comes_back(plan: QuantizationPlan) -> set[str]:
    """The layers in float that run in integers if a rule with their name says so: found by planning with all these rules."""
    target = TARGETS[plan.settings.deployment_settings.target_framework]
    fixed = {rule.match for rule in plan.settings.layer_settings if _reaches(rule)}

    def may(layer: Layer) -> bool:
        return plan.decisions[layer.name].reason in _MAY_COME_BACK and target.computes_in_int8(layer) and layer.name not in fixed

    wanted = [layer.name for layer in plan.graph if layer.weighted and may(layer)]
    if not wanted:
        return set()
    settings = load_settings(plan.settings)
    settings.layer_settings = [
        dataclasses.replace(rule, skip_quantization=None) if rule.match in set(wanted) else rule for rule in settings.layer_settings
    ]
    settings.layer_settings = [rule for rule in settings.layer_settings if _says(rule)]
    settings.layer_settings += [LayerRule(match=name, skip_quantization=False) for name in wanted]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            then = plan_quantization(plan.graph, settings)
    except CCOError:
        return set()
    return then.quantized.intersection(wanted)


def _reaches(rule: LayerRule) -> bool:
    """Whether a rule skips other layers than those it names, which taking the skip back would change as well."""
    return bool(rule.skip_quantization and (rule.skip_quantization_until or rule.skip_quantization_downstream))


def _says(rule: LayerRule) -> bool:
    return bool(_parts(rule))


def _parts(rule: LayerRule) -> dict[str, Any]:
    settings = load_settings()
    settings.layer_settings = [rule]
    return {part: value for part, value in settings.to_dict()["layer_settings"][0].items() if part not in ("match", "by")}


def rules_now(plan: QuantizationPlan) -> list[dict[str, str]]:
    """The rules that make a plan, as parts in YAML: those of the recipe, of its budget, and of automatic skips.

    A rule of the budget says only what no rule of the user's does, since it would win over a wider one once it is written down.
    """
    rules = load_settings(plan.settings).layer_settings
    own = [rule for rule in rules if rule.by != "budget"]
    resolved = apply_rules(plan.graph, own)
    found = [{"match": rule.match, **_parts(rule)} for rule in own]
    for rule in rules:
        if rule.by == "budget":
            known = resolved.get(rule.match, ResolvedRules())
            names = {"skip_quantization": known.skip, "weights_num_bits": known.weights_num_bits}
            names |= {"weights_group_size": known.weights_group_size, "weights_symmetric": known.weights_symmetric}
            names |= {"activations_dynamic": known.activations_dynamic}
            names |= {"activations_num_bits": known.activations_num_bits, "weight_only": known.weight_only}
            parts = {part: value for part, value in _parts(rule).items() if names.get(part) is None}
            found += [{"match": rule.match, **parts}] if parts else []
    skipped = {rule["match"] for rule in found if rule.get("skip_quantization") is not None}
    found += [
        {"match": name, "skip_quantization": True}
        for name in plan.suggestions
        if name not in skipped and plan.decisions[name].reason is SkipReason.SUGGESTION
    ]
    return [{part: yaml_value(value) for part, value in rule.items()} for rule in found]


def sections_now(plan: QuantizationPlan) -> list[str]:
    """The lines of YAML other than ``layer_settings`` that fix the plan of a recipe with a budget; none without a budget."""
    budget, empty = plan.settings.budget_settings, BudgetSettings()
    set_ones = [name for name, value in vars(budget).items() if value != getattr(empty, name)]
    if not set_ones:
        return []
    return [
        f"budget_settings: {yaml_value({name: getattr(empty, name) for name in set_ones})}",
        "global_quantization_settings: {skip_tail_quantization: false}",
        f"deployment_settings: {yaml_value({'int4': packs_weights(plan.settings)})}",
    ]
