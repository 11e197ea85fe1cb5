"""What is wrong with several values of a recipe together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lightning_cco._values import FP16_FRAMEWORKS
from lightning_cco.names import printable, shown

_LONGEST_MATCH, _MOST_STARS = 4096, 20


def problem_with_rule(rule: Mapping[str, Any]) -> str:
    """What is wrong with the values of a rule together, in words that go on from its place in the recipe; empty if nothing is."""
    match, until = rule.get("match", ""), rule.get("skip_quantization_until") or []
    if not match:
        return (
            ": `match` is missing: which layers is it about? Write a layer's name, a module's path or a glob, such as {match: conv_1, ...}."
        )
    named = f" (match: {printable(f'{match}', 160)})"
    for pattern in (match, *until):
        if isinstance(pattern, str) and (len(pattern) > _LONGEST_MATCH or pattern.count("*") > _MOST_STARS):
            return (
                f"{named}: expected a name or glob of at most {_LONGEST_MATCH:,} characters and {_MOST_STARS} stars, got one of {len(pattern):,} characters "
                f"and {pattern.count('*'):,} stars."
            )
    downstream = rule.get("skip_quantization_downstream")
    reaching = "skip_quantization_until" if until else "skip_quantization_downstream" if downstream else ""
    if reaching and rule.get("skip_quantization") is not True:
        return f"{named}: {reaching} says how far a skip goes, but skip_quantization is not true. Add skip_quantization: true."
    if rule.get("weight_only") and rule.get("skip_quantization") is not None:
        return f"{named}: weight_only says that the weights alone are quantized; skip_quantization says something else. Keep one of them."
    if rule.get("weights_group_size") and rule.get("weight_only") is False:
        return f"{named}: weights in groups (weights_group_size) are multiplied in float; weight_only: false says something else. Keep one of them."
    if rule.get("activations_dynamic") and rule.get("weight_only") is False:
        return f"{named}: activations_dynamic rounds what a layer reads when it runs; weight_only: false asks for ranges that are calibrated. Keep one of them."
    if until and downstream:
        return f"{named}: skip_quantization_until and skip_quantization_downstream contradict each other. Keep one of them."
    return ""


def problem_with_deployment(values: Mapping[str, Any]) -> str:
    """What is wrong with the values of the deployment together, in words that go on from its place in the recipe; empty if nothing is."""
    target = values.get("target_framework")
    if values.get("fp16") and target not in FP16_FRAMEWORKS:
        return (
            f".fp16: floats of 16 bits are for target_framework: {', '.join(FP16_FRAMEWORKS)}, not for {target}, which decides itself in which float type "
            "it computes. Leave fp16 out."
        )
    return ""


def problem_with_stage(values: Mapping[str, Any]) -> str:
    """What is wrong with the values of a stage together, in words that go on from its place in the recipe; empty if nothing is."""
    whens = [key for key in ("at_step", "at_epoch") if values.get(key) is not None]
    if len(whens) != 1:
        came = "both" if whens else "neither"
        return f": expected at_step or at_epoch, got {came}. Write {{at_step: 500, weights_num_bits: 4}}."
    if values.get("weights_num_bits") is None and values.get("activations_num_bits") is None:
        return f": a stage without bits changes nothing. Write {{{whens[0]}: {values[whens[0]]}, weights_num_bits: 4}}."
    return ""


def problem_with_stages(stages: Sequence[Any]) -> str:
    """What is wrong with the order of stages, in words; empty if nothing is."""
    for key in ("at_step", "at_epoch"):
        times = [time for stage in stages if (time := getattr(stage, key)) is not None]
        if any(later <= earlier for earlier, later in pairwise(times)):
            return f"expected stages in the order of their time, got {key}: {', '.join(map(str, times))}."
    return ""


def problem_with_budget(values: Mapping[str, Any]) -> str:
    """What is wrong with the values of a budget together, in words; empty if nothing is."""
    goals = [goal for goal in ("size", "average_bits", "bops", "accuracy_drop") if values.get(goal) is not None]
    if len(goals) > 1:
        return f"expected one goal at a time, got {' and '.join(goals)}. Keep one of them."
    speed = values.get("speed") is not None
    if speed and goals and goals[0] not in ("size", "accuracy_drop"):
        return f"speed goes alone, or together with size or accuracy_drop, got {goals[0]}. Keep one of them."
    goals += ["speed"] if speed else []
    if "accuracy_drop" in goals and not values.get("metric"):
        return "accuracy_drop is of a metric, which is missing. Write metric: val_acc, or what validation_step logs."
    if values.get("metric") and "accuracy_drop" not in goals:
        return f"metric: {shown(values['metric'])} is what accuracy_drop is of, which is missing. Write accuracy_drop: 0.005, or leave metric out."
    if values.get("accuracy_drop_by", "size") != "size" and "accuracy_drop" not in goals:
        return (
            "accuracy_drop_by says which plan within accuracy_drop is taken, which is missing. Write accuracy_drop: 0.005, or leave it out."
        )
    for key, what in (
        ("revise_every_n_epochs", "says how often a budget is revised"),
        ("layer_times", "is what a speed is predicted from"),
    ):
        if values.get(key) is not None and not goals:
            return f"{key} {what}, but there is no goal. Write one of size, average_bits, bops, accuracy_drop or speed."
    return ""
