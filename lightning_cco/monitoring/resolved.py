"""The resolved recipe as a text that people read: every layer with its decision, and why."""

from __future__ import annotations

import math

import yaml

from lightning_cco.budget.plan import BudgetPlan
from lightning_cco.monitoring.plan_log import rounded_to
from lightning_cco.names import literal, printable, yaml_value
from lightning_cco.number_format import figure
from lightning_cco.quantization.plan import QuantizationPlan


def resolved_yaml(plan: QuantizationPlan, budget: BudgetPlan | None = None) -> str:
    """A recipe with a rule for every layer; planning with it gives the plan again.

    Args:
        plan: The plan; a comment after each rule has the layer's module and how it runs.
        budget: The plan of a budget; the comments also have the times of the layers, if known.
    """
    plain = plan.resolved_settings().to_dict()
    rules = plain.pop("layer_settings")
    lines = [
        "# Every layer with its decision (the tail is among them, hence skip_tail_quantization: false). Can be fed back as it is.",
        yaml.dump(literal(plain), Dumper=yaml.SafeDumper, sort_keys=False, allow_unicode=True).rstrip(),
        "layer_settings:",
    ]
    seconds = {} if budget is None else {entry.layer: entry.seconds for entry in budget.layers if math.isfinite(entry.seconds)}
    if budget is not None and budget.times is not None:
        lines.insert(
            1,
            f"# Predicted speed {figure(budget.chosen.speed, 3)} times that in float: {figure(1e3 * budget.seconds, 3)} ms instead of "
            f"{figure(1e3 * budget.float_seconds, 3)} ms, by the times of layers in layer_times.json ({printable(budget.times.engine)}, "
            f"{printable(budget.times.processor)}).",
        )
    for rule in rules:
        name = rule["match"]
        path = plan.graph[name].path
        bits = rounded_to(plan, name)
        rounded = f"computed in float, result rounded to {bits} bits for INT8 layers, " if bits else "not quantized, "
        left = "" if name in plan.weight_only else rounded
        done = "quantized" if name in plan.quantized else f"{left}{plan.skipped[name]}"
        done += f", {figure(1e6 * seconds[name], 3)} µs" if name in seconds else ""
        lines.append(f"  - {yaml_value(rule)}  # {printable(f'{path}: ' if path else '')}{printable(done)}")
    return "\n".join([*lines, ""])
