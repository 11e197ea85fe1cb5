"""``report.json``: all that the page shows, as plain data. Its fields are described in ``docs/report.md``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_cco.budget.plan import BudgetPlan
from lightning_cco.export.report import ExportReport
from lightning_cco.level_use import LayerLevels
from lightning_cco.loss_sensitivity import LossSensitivityReport
from lightning_cco.names import yaml_value
from lightning_cco.quantization.plan import QuantizationPlan, packs_weights
from lightning_cco.quantization.targets import TARGETS
from lightning_cco.quantization.tensor_key import TensorKey
from lightning_cco.report_page.choices import choices, rules_now, sections_now
from lightning_cco.report_page.facts import ModelFacts
from lightning_cco.sensitivity import SensitivityReport
from lightning_cco.suggestions import Suggestion
from lightning_cco.tensor_views import TensorViews, levels
from lightning_cco.version import __version__

VERSION = 1
"""Of the fields; it rises when one changes its meaning or goes, not when one is added."""
Epochs = Sequence[tuple[int, Mapping[str, float]]]
"""Numbers by name for each of some epochs, in order."""


@dataclass
class RunState:
    """What is known of a run by now.

    Attributes:
        plan: What is quantized; `None` before it is planned.
        epoch: Number of the epoch that was measured last; `None` before the first.
        step: Global step then.
        finished: Whether the training has ended.
        metrics: The metrics of that epoch.
        original: Those of the float model before training.
        calibrated: Those after the calibration.
        directions: ``min`` or ``max`` by metric, where it is known which is better.
        extremes: By metric ``lowest``, ``lowest_epoch``, ``highest``, ``highest_epoch``.
        metric_epochs: Metrics by epoch.
        qs_epochs: Quantization Sensitivity by epoch.
        loss_epochs: Expected rise of the loss by epoch.
        report: The sensitivities measured last.
        losses: The loss sensitivities measured last.
        levels: How each layer uses its levels.
        views: Ranges and histograms.
        facts: The model, and how many weights there are.
        suggestions: What to skip.
        budget: What a budget has chosen.
        export: What the check of an exported file has found.
    """

    plan: QuantizationPlan | None = None
    epoch: int | None = None
    step: int = 0
    finished: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    original: Mapping[str, float] = field(default_factory=dict)
    calibrated: Mapping[str, float] = field(default_factory=dict)
    directions: Mapping[str, str] = field(default_factory=dict)
    extremes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    metric_epochs: Epochs = ()
    qs_epochs: Epochs = ()
    loss_epochs: Epochs = ()
    report: SensitivityReport | None = None
    losses: LossSensitivityReport | None = None
    levels: Mapping[str, LayerLevels] = field(default_factory=dict)
    views: TensorViews = field(default_factory=TensorViews)
    facts: ModelFacts = field(default_factory=ModelFacts)
    suggestions: Sequence[Suggestion] = ()
    budget: BudgetPlan | None = None
    export: ExportReport | None = None
    _of_plan: tuple[QuantizationPlan, dict[str, Any]] | None = field(default=None, init=False, repr=False)

    def of_plan(self) -> dict[str, Any]:
        """What follows from the plan alone, worked out once for each plan."""
        assert self.plan is not None
        if self._of_plan is None or self._of_plan[0] is not self.plan:
            plan = self.plan
            told = {"choices": choices(plan), "tensors": _tensors(plan), "rules": rules_now(plan), "sections": sections_now(plan)}
            self._of_plan = plan, told
        return self._of_plan[1]


def report_data(state: RunState) -> dict[str, Any]:
    """The content of ``report.json``; every number is finite or a text, ``"nan"``, ``"inf"`` or ``"-inf"``.

    Args:
        state: The run; it has a plan.
    """
    plan = state.plan
    assert plan is not None
    settings = plan.settings
    general = settings.global_quantization_settings
    names = list(plan.graph.names)
    place = {name: number for number, name in enumerate(names)}
    data = {
        "version": VERSION,
        "made_by": f"lightning_cco {__version__}",
        "title": state.facts.model,
        "epoch": state.epoch,
        "step": state.step,
        "finished": state.finished,
        "target": settings.deployment_settings.target_framework,
        "thresholds": {
            "qs": general.quantization_sensitivity_threshold,
            "relative": general.quantization_sensitivity_relative_threshold,
            "loss": general.loss_sensitivity_threshold,
        },
        "defaults": {"weights_bits": general.weights_num_bits, "output_bits": general.activations_num_bits},
        "counts": _counts(plan),
        "layers": _layers(state, plan),
        "edges": [[place[edge.source], place[edge.destination]] for edge in plan.graph.edges],
        "tensors": state.of_plan()["tensors"],
        "metrics": _metrics(state),
        "qs": _by_epoch(state.qs_epochs),
        "loss": _losses(state),
        "size": {"float_bytes": state.facts.float_bytes, "packed": packs_weights(settings)},
        "speed": None if state.budget is None or state.budget.model is None else state.budget.model.to_plain(),
        "rules": state.of_plan()["rules"],
        "sections": state.of_plan()["sections"],
        "suggestions": [asdict(suggestion) for suggestion in state.suggestions],
        "budget": None if state.budget is None else state.budget.to_dict(),
        "export": None if state.export is None else {**asdict(state.export), "size_ratio": state.export.size_ratio},
    }
    plain: dict[str, Any] = _plain(data)
    return plain


def to_json(data: Mapping[str, Any]) -> str:
    """One line of JSON in ASCII."""
    return json.dumps(data, allow_nan=False, separators=(",", ":"))


def _counts(plan: QuantizationPlan) -> dict[str, Any]:
    weighted = [layer.name for layer in plan.graph if layer.weighted]
    return {
        "layers": plan.counted,
        "quantized": len(plan.quantized),
        "weighted": len(weighted),
        "weighted_in_int8": sum(name in plan.in_int8 for name in weighted),
        "packed": len(plan.packed),
        "weight_only": len(plan.weight_only),
        "share_of_multiplications": plan.share_of_multiplications,
    }


def _layers(state: RunState, plan: QuantizationPlan) -> list[dict[str, Any]]:
    may, measured, bits = state.of_plan()["choices"], state.report, plan.output_bits()
    found = []
    for layer in plan.graph:
        name, decision = layer.name, plan.decisions[layer.name]
        entry: dict[str, Any] = {
            "name": name,
            "yaml": yaml_value(name),
            "path": layer.path,
            "kind": layer.kind,
            "runs": _runs(plan, name),
            "reason": plan.skipped.get(name, ""),
            "inputs": [list(shape) for shape in layer.input_shapes],
            "outputs": [list(shape) for shape in layer.output_shapes],
            "attributes": {str(key): _text(value) for key, value in layer.attributes.items()},
            "parameters": list(layer.parameters),
            "weighted": layer.weighted or None,
            "multiplications": layer.multiplications,
            "weights_bits": decision.weights_num_bits,
            "output_bits": bits.get(name),
            "group_size": decision.weights_group_size,
            "weights": _weights(state, name),
            "output": _output(state, name),
            "choices": may.get(name),
        }
        if name in state.levels:
            entry["levels"] = dict(vars(state.levels[name]))
        if measured is not None and name in measured.main:
            now, accumulated = measured.main[name], measured.accumulated.get(name)
            entry["sensitivity"] = {key: value for key, value in vars(now).items() if key != "name"}
            entry["sensitivity"]["accumulated_qs"] = accumulated.qs if accumulated else math.nan
        found.append({key: value for key, value in entry.items() if value not in (None, "", [], {})})
    return found


def _runs(plan: QuantizationPlan, name: str) -> str:
    kind = plan.graph[name].kind
    if kind in ("input", "output"):
        return kind
    if name in plan.quantized:
        return "packed" if name in plan.packed else "int8"
    return "weight-only" if name in plan.weight_only else "float"


def _weights(state: RunState, name: str) -> dict[str, Any] | None:
    facts, view = state.facts.layers.get(name), state.views.weights.get(name)
    if facts is None and view is None:
        return None
    found: dict[str, Any] = {} if facts is None else dict(vars(facts))
    if view is not None:
        found |= {**vars(view), "histogram": vars(view.histogram)}
    return found


def _output(state: RunState, name: str) -> dict[str, Any] | None:
    view = state.views.activations.get(name)
    if view is None:
        return None
    ends = levels(view.num_bits, view.symmetric, view.scale, view.zero_point)
    return {**vars(view), "histogram": vars(view.histogram), "levels": ends}


def _tensors(plan: QuantizationPlan) -> list[dict[str, Any]]:
    """The rounded tensors, and the layers for whose sake each is: those that make it in integers and those that read it so."""
    target = TARGETS[plan.settings.deployment_settings.target_framework]
    readers: dict[TensorKey, list[str]] = {}
    for edge in plan.graph.edges:
        origin = plan.origins.get(TensorKey(edge.source, edge.source_output))
        if origin is not None and edge.destination in plan.quantized:
            readers.setdefault(origin, []).append(edge.destination)
    before = {after: inner for inner, after in plan.groups.items()}
    found = []
    for key, spec in plan.tensors.items():
        users = dict.fromkeys(readers.get(key, ()))
        if plan.graph[plan.computed_with(key.layer)].kind not in target.float_outputs:
            maker: str | None = key.layer
            while maker is not None:
                if maker in plan.quantized and plan.graph[maker].kind not in ("input", "batch_norm") and maker not in plan.folded:
                    users[maker] = None
                maker = before.get(maker)
        follows = key.as_read or (key.output == 0 and plan.as_read(key) == key)
        found.append({"name": str(key), "layer": key.layer, "bits": spec.num_bits, "follows": follows, "users": list(users)})
    return found


def _metrics(state: RunState) -> dict[str, Any]:
    found: dict[str, Any] = {}
    history = _by_epoch(state.metric_epochs)
    for name in dict.fromkeys([*state.metrics, *state.original, *history["values"]]):
        direction = state.directions.get(name)
        ends = state.extremes.get(name)
        entry: dict[str, Any] = {"direction": direction, "now": state.metrics.get(name)}
        entry |= {"original": state.original.get(name), "calibrated": state.calibrated.get(name)}
        if ends is not None:
            entry |= {"lowest": [ends["lowest"], ends["lowest_epoch"]], "highest": [ends["highest"], ends["highest_epoch"]]}
        found[name] = entry
    return {"names": found, **history}


def _by_epoch(history: Epochs) -> dict[str, Any]:
    names = dict.fromkeys(name for _, values in history for name in values)
    return {"epochs": [epoch for epoch, _ in history], "values": {name: [values.get(name) for _, values in history] for name in names}}


def _losses(state: RunState) -> dict[str, Any] | None:
    if state.losses is None or state.plan is None:
        return None
    told = state.losses.to_dict()
    return {
        "of": told["loss"],
        "weights": told["weights"],
        "activations": told["activations"],
        "now": state.losses.rises(state.plan),
        **_by_epoch(state.loss_epochs),
    }


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (tuple, list)):
        return "×".join(map(str, value))
    return str(value)[:200]


_AS_IS = (int, str, bool, type(None))


def _plain(value: Any) -> Any:
    """As JSON can hold it, with five significant digits of what is not whole."""
    kind = type(value)
    if kind in _AS_IS:
        return value
    if kind is float:
        if math.isfinite(value):
            return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.5g}")
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): item if type(item) in _AS_IS else _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [item if type(item) in _AS_IS else _plain(item) for item in value]
    return _plain(float(value)) if isinstance(value, float) else value
