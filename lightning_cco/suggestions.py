"""Which layers are better left in float, and the recipe lines that do it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_cco.loss_sensitivity import LossSensitivityReport
from lightning_cco.names import printable, yaml_value
from lightning_cco.number_format import badness, figure, is_above
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.quantization.planner import plan_quantization
from lightning_cco.quantization.tensor_key import TensorKey
from lightning_cco.sensitivity import LayerSensitivity, SensitivityReport
from lightning_cco.settings import GlobalQuantizationSettings, LayerRule, Settings, load_settings


@dataclass(frozen=True)
class Suggestion:
    """A layer to skip.

    Attributes:
        name: The layer.
        qs: Its Quantization Sensitivity.
        relative: Norm of its error over the norm of its output.
        sqnr_db: Signal-to-quantization-noise ratio in dB.
        reason: What was measured against which threshold.
        wins: How much less the loss is expected to rise if it is skipped; NaN if that was not measured.
        costs: How much larger the weights of the model become, as a part of their size now; NaN if their sizes were not given.
    """

    name: str
    qs: float
    relative: float
    sqnr_db: float
    reason: str
    wins: float = math.nan
    costs: float = math.nan

    @property
    def balance(self) -> str:
        """What it wins and costs, in words; empty where neither is known.

        >>> Suggestion("conv", 1.0, 0.6, 4.0, "", wins=0.0123, costs=0.031).balance
        'expected: -0.0123 of the loss, +3.1 % size of the weights'
        """
        parts = [] if math.isnan(self.wins) else [f"-{figure(self.wins, 3)} of the loss"]
        parts += [] if math.isnan(self.costs) or abs(self.costs) < 5e-5 else [f"+{figure(100 * self.costs, 2)} % size of the weights"]
        return f"expected: {', '.join(parts)}" if parts else ""


def suggest_skips(
    report: SensitivityReport,
    plan: QuantizationPlan,
    settings: Settings,
    losses: LossSensitivityReport | None = None,
    elements: Mapping[str, int] | None = None,
) -> list[Suggestion]:
    """The layers to skip because something above a threshold is rounded in them, worst first.

    Judged by the local sensitivity where there is one: an accumulated error would blame every layer after the bad one. NaN and infinity are above
    any threshold. The relative threshold holds for the whole output and for its batch-varying part (see `lightning_cco.sensitivity`): what tells inputs apart
    may be lost while the whole output is hardly changed.

    A layer with weights is suggested alone: most often they are the cause. Where the rounding of its output is (it has no weights, or is in float already
    and measured all the same), skipping it alone would change nothing, since what reads it in INT8 has its input rounded: then the layers that read it, and
    those fused with it, are suggested too.

    Args:
        report: What was measured.
        plan: What is quantized.
        settings: The thresholds. A layer that a rule keeps in INT8 is not suggested.
        losses: The loss sensitivities, if they were measured: what is suggested with ``automatic_skip_by: loss``, and what each skip wins.
        elements: How many weights each layer has, for what a skip costs.
    """
    general = settings.global_quantization_settings
    above = (
        _above_of_loss(report, plan, losses, general)
        if losses is not None and general.automatic_skip_by == "loss"
        else _above_of_qs(report, general)
    )
    found: dict[str, Suggestion] = {}
    around = _Neighbours(plan)
    if losses is None or general.automatic_skip_by != "loss":
        above |= {name: entry for name, entry in _lost_on_readers(report, around, general).items() if name not in above}
    rises = losses.rises(plan) if losses is not None else {}
    sizes = _bytes_now(plan, elements or {})
    for name, (entry, said) in above.items():
        if name in plan.quantized or name in plan.weight_only:
            found[name] = Suggestion(name, entry.qs, entry.relative, entry.sqnr_db, f"{said}{_culprit(entry, plan)}")
        for other, relation in around.companions(name):
            if other not in found and other not in above:
                found[other] = Suggestion(other, entry.qs, entry.relative, entry.sqnr_db, f"it {relation} '{name}', and {said}")
    balanced = [
        replace(suggestion, wins=rises.get(suggestion.name, math.nan), costs=_cost(suggestion.name, elements or {}, sizes))
        for suggestion in found.values()
    ]
    return _effective(balanced, plan, settings)


def _bytes_now(plan: QuantizationPlan, elements: Mapping[str, int]) -> dict[str, float]:
    """Bytes of each layer's weights as planned."""
    return {name: count * (plan.decisions[name].weights_num_bits or 32) / 8 for name, count in elements.items() if name in plan.decisions}


def _cost(name: str, elements: Mapping[str, int], sizes: Mapping[str, float]) -> float:
    if not elements:
        return math.nan
    return (4 * elements.get(name, 0) - sizes.get(name, 0.0)) / max(1.0, sum(sizes.values()))


def _above_of_loss(
    report: SensitivityReport, plan: QuantizationPlan, losses: LossSensitivityReport, general: GlobalQuantizationSettings
) -> dict[str, tuple[LayerSensitivity, str]]:
    """The layers whose expected rise of the loss is above the threshold, the most costly first."""
    unknown = LayerSensitivity("", math.nan, math.nan, math.nan)
    rises = losses.rises(plan)
    found = {}
    for name in sorted(rises, key=lambda name: -badness(rises[name])):
        said = _above(f"expected rise of the {losses.loss}", rises[name], general.loss_sensitivity_threshold)
        if said:
            found[name] = (replace(report.main.get(name, unknown), name=name), said)
    return found


def _above_of_qs(report: SensitivityReport, general: GlobalQuantizationSettings) -> dict[str, tuple[LayerSensitivity, str]]:
    above: dict[str, tuple[LayerSensitivity, str]] = {}
    for entry in report.worst_first():
        reasons = [
            _above("Quantization Sensitivity", entry.qs, general.quantization_sensitivity_threshold),
            _above("relative error", entry.relative, general.quantization_sensitivity_relative_threshold),
        ]
        if not math.isnan(entry.varying_relative):
            what = "relative error (of what varies between samples)"
            reasons.append(_above(what, entry.varying_relative, general.quantization_sensitivity_relative_threshold))
        said = " and ".join(reason for reason in reasons if reason)
        if said:
            above[entry.name] = (entry, said)
    return above


_HARMLESS = 0.1
"""Part of the threshold up to which the errors of what a layer reads say nothing of a loss."""


def _lost_on_readers(
    report: SensitivityReport, around: _Neighbours, general: GlobalQuantizationSettings
) -> dict[str, tuple[LayerSensitivity, str]]:
    """The tensors whose rounding a reader suffers from, though it is small beside the tensor itself: one huge column hides what the others have lost.

    They are told by the reader: after rounded layers its output is off, though its own rounding and what it reads are not.
    """
    threshold = general.quantization_sensitivity_relative_threshold
    found: dict[str, tuple[LayerSensitivity, str]] = {}
    if threshold is None:
        return found
    for reader, sources in around.sources.items():
        entry, local = report.accumulated.get(reader), report.local.get(reader)
        before = [report.accumulated.get(source) for source in sources]
        if entry is None or local is None or not is_above(_worst(entry), threshold) or not _worst(local) <= threshold:
            continue
        if all(one is not None and _worst(one) <= _HARMLESS * threshold for one in before):
            said = f"by its rounding the output of '{reader}' has a relative error of {figure(_worst(entry))}, above {figure(threshold)}"
            for source in sources:
                if source in around.outputs:
                    found.setdefault(source, (replace(entry, name=source), said))
    return found


def _worst(entry: LayerSensitivity) -> float:
    return max(entry.relative, 0.0 if math.isnan(entry.varying_relative) else entry.varying_relative)


class _Neighbours:
    """What stands around a quantized tensor: the group that makes it, the INT8 layers that read it."""

    def __init__(self, plan: QuantizationPlan) -> None:
        self.plan = plan
        self.outputs = plan.output_bits()
        self.readers: dict[str, list[str]] = {}
        self.sources: dict[str, list[str]] = {}
        for edge in plan.graph.edges:
            if edge.destination in plan.quantized and plan.origins.get(TensorKey(edge.destination)) == TensorKey(edge.destination):
                source = plan.origins[TensorKey(edge.source, edge.source_output)].layer
                self.readers.setdefault(source, []).append(edge.destination)
                self.sources.setdefault(edge.destination, []).append(source)

    def companions(self, name: str) -> list[tuple[str, str]]:
        """The layers that must be skipped with one for its output to stay in float, with their relation to it; none if it may be its weights."""
        layer = self.plan.graph[name]
        if name not in self.outputs or layer.kind == "input" or self.plan.decisions[name].weights_num_bits is not None:
            return []
        found = [(inner, "is fused with") for inner in self.plan.fused_before(name)]
        return found + [(reader, "reads the output of") for reader in dict.fromkeys(self.readers.get(name, ()))]


def _effective(suggestions: list[Suggestion], plan: QuantizationPlan, settings: Settings) -> list[Suggestion]:
    """Those that a plan with them really skips: a rule of the user's may keep a layer in INT8."""
    if not suggestions:
        return []
    then = plan_quantization(plan.graph, settings, [*plan.suggestions, *(suggestion.name for suggestion in suggestions)])
    return [suggestion for suggestion in suggestions if suggestion.name not in then.quantized | then.weight_only]


def _above(what: str, value: float, threshold: float | None) -> str:
    if not math.isfinite(value):
        return f"its {what} is {value}"
    if threshold is None or not is_above(value, threshold):
        return ""
    return f"its {what} of {figure(value)} is above {figure(threshold)}"


def _culprit(entry: LayerSensitivity, plan: QuantizationPlan) -> str:
    decision = plan.decisions[entry.name]
    parts = []
    if decision.weights_num_bits is not None:
        parts.append(f"the weights to {decision.weights_num_bits} bits")
    if decision.activations_num_bits is not None:
        parts.append(f"the output to {decision.activations_num_bits} bits")
    return f" (rounding {' and '.join(parts)})" if parts else ""


def suggestions_yaml(suggestions: Sequence[Suggestion], settings: Settings | None = None, applied: Sequence[str] = ()) -> str:
    """A recipe's ``layer_settings`` with the suggested skips.

    The rules that ``settings`` has already come first, since merging recipes replaces lists: the text can be merged over the recipe as it is.

    Args:
        suggestions: The suggested skips.
        settings: The recipe.
        applied: Layers that are already skipped automatically.
    """
    lines = ["# Suggested by the Quantization Sensitivity of the last epoch. Merge over the recipe as it is."]
    known = settings.to_dict()["layer_settings"] if settings is not None else []
    if not suggestions and not known and not applied:
        return "\n".join([*lines, "# Nothing is above the threshold.", "layer_settings: []", ""])
    lines.append("layer_settings:")
    for rule in known:
        lines.append(f"  - {yaml_value(rule)}")
    if applied:
        lines.append("  # Applied by automatic_skip_quantization.")
    for name in applied:
        lines.append(f"  - {yaml_value({'match': name, 'skip_quantization': True})}")
    for suggestion in suggestions:
        figures = f"QS {suggestion.qs:,.4g}, relative {suggestion.relative:.4g}, SQNR {suggestion.sqnr_db:.1f} dB"
        lines.append(f"  # {figures}: {printable(suggestion.reason)}")
        if suggestion.balance:
            lines.append(f"  # {suggestion.balance}")
        lines.append(f"  - {yaml_value({'match': suggestion.name, 'skip_quantization': True})}")
    if not suggestions:
        lines.append("  # Nothing is above the threshold now.")
    return "\n".join([*lines, ""])


def merge_suggestions(settings: Settings, suggestions: Sequence[Suggestion]) -> Settings:
    """The recipe with the suggested skips added."""
    merged = load_settings(settings)
    known = {rule.match for rule in merged.layer_settings if rule.skip_quantization}
    merged.layer_settings += [LayerRule(match=s.name, skip_quantization=True) for s in suggestions if s.name not in known]
    return merged
