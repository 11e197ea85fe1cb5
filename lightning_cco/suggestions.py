"""Which layers are better left in float, and the recipe lines that do it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.sensitivity import LayerSensitivity, SensitivityReport
from lightning_cco.settings import LayerRule, Settings, load_settings


@dataclass(frozen=True)
class Suggestion:
    """A layer to skip.

    Attributes:
        name: The layer.
        qs: Its Quantization Sensitivity.
        relative: Norm of its error over the norm of its output.
        sqnr_db: Signal-to-quantization-noise ratio in dB.
        reason: What was measured against which threshold.
    """

    name: str
    qs: float
    relative: float
    sqnr_db: float
    reason: str


def suggest_skips(report: SensitivityReport, plan: QuantizationPlan, settings: Settings) -> list[Suggestion]:
    """The layers above a threshold that the plan quantizes now, worst first.

    Judged by the local sensitivity where there is one: an accumulated error would blame every layer after the bad one. NaN and infinity are above
    any threshold.

    Args:
        report: What was measured.
        plan: What is quantized.
        settings: The thresholds.
    """
    general = settings.global_quantization_settings
    found = []
    for entry in report.worst_first():
        if entry.name not in plan.quantized:
            continue
        reasons = [
            _above("Quantization Sensitivity", entry.qs, general.quantization_sensitivity_threshold),
            _above("relative error", entry.relative, general.quantization_sensitivity_relative_threshold),
        ]
        said = " and ".join(reason for reason in reasons if reason)
        if said:
            found.append(Suggestion(entry.name, entry.qs, entry.relative, entry.sqnr_db, f"{said}{_culprit(entry, plan)}"))
    return found


def _above(what: str, value: float, threshold: float | None) -> str:
    if not math.isfinite(value):
        return f"its {what} is {value}"
    if threshold is None or value <= threshold:
        return ""
    return f"its {what} of {_figure(value)} is above {_figure(threshold)}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _culprit(entry: LayerSensitivity, plan: QuantizationPlan) -> str:
    decision = plan.decisions[entry.name]
    parts = []
    if decision.weights_num_bits is not None:
        parts.append(f"{decision.weights_num_bits}-bit weights")
    if decision.activations_num_bits is not None:
        parts.append(f"a {decision.activations_num_bits}-bit output")
    return f" (rounding {' and '.join(parts)})" if parts else ""


def suggestions_yaml(suggestions: Sequence[Suggestion], settings: Settings | None = None) -> str:
    """A recipe's ``layer_settings`` with the suggested skips.

    The rules that ``settings`` has already come first, since merging recipes replaces lists: the text can be merged over the recipe as it is.
    """
    lines = ["# Suggested by the Quantization Sensitivity of the last epoch. Merge over the recipe as it is."]
    known = settings.to_dict()["layer_settings"] if settings is not None else []
    if not suggestions and not known:
        return "\n".join([*lines, "# Nothing is above the threshold.", "layer_settings: []", ""])
    lines.append("layer_settings:")
    for rule in known:
        lines.append("  - {" + ", ".join(f"{key}: {_yaml(value)}" for key, value in rule.items()) + "}")
    for suggestion in suggestions:
        lines.append(
            f"  # QS {suggestion.qs:,.4g}, relative {suggestion.relative:.4g}, SQNR {suggestion.sqnr_db:.1f} dB: {suggestion.reason}"
        )
        lines.append(f"  - {{match: {_yaml(suggestion.name)}, skip_quantization: true}}")
    if not suggestions:
        lines.append("  # Nothing is above the threshold.")
    return "\n".join([*lines, ""])


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if isinstance(value, str):
        return value if value.replace("_", "").isalnum() and not value[0].isdigit() else "'" + value.replace("'", "''") + "'"
    return str(value)


def merge_suggestions(settings: Settings, suggestions: Sequence[Suggestion]) -> Settings:
    """The recipe with the suggested skips added."""
    merged = load_settings(settings)
    known = {rule.match for rule in merged.layer_settings if rule.skip_quantization}
    merged.layer_settings += [LayerRule(match=s.name, skip_quantization=True) for s in suggestions if s.name not in known]
    return merged
