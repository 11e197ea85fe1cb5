"""The resolved recipe as a text that people read: every layer with its decision, and why."""

from __future__ import annotations

import yaml

from lightning_cco.monitoring.plan_log import rounded_to
from lightning_cco.names import literal, printable, yaml_value
from lightning_cco.quantization.plan import QuantizationPlan


def resolved_yaml(plan: QuantizationPlan) -> str:
    """A recipe with a rule for every layer; planning with it gives the plan again.

    Args:
        plan: The plan; behind each rule stands the layer's module and what is done to it.
    """
    plain = plan.resolved_settings().to_dict()
    rules = plain.pop("layer_settings")
    lines = [
        "# Every layer with its decision (the tail is among them, hence skip_tail_quantization: false). Can be fed back as it is.",
        yaml.dump(literal(plain), Dumper=yaml.SafeDumper, sort_keys=False, allow_unicode=True).rstrip(),
        "layer_settings:",
    ]
    for rule in rules:
        name = rule["match"]
        path = plan.graph[name].path
        bits = rounded_to(plan, name)
        rounded = f"computed in float, result rounded to {bits} bits for INT8 layers, " if bits else "not quantized, "
        left = "" if name in plan.weight_only else rounded
        done = "quantized" if name in plan.quantized else f"{left}{plan.skipped[name]}"
        lines.append(f"  - {yaml_value(rule)}  # {printable(f'{path}: ' if path else '')}{printable(done)}")
    return "\n".join([*lines, ""])
