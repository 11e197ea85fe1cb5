"""A budget's plan: the rules that it adds to a recipe, what is expected of it, and the trade-off that it was chosen from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lightning_cco.budget.layer_times import LayerTimes
from lightning_cco.budget.speed import SpeedModel
from lightning_cco.settings import BudgetSettings, LayerRule, Settings, load_settings

GOALS = ("size", "average_bits", "bops", "accuracy_drop", "speed")
"""The first that a recipe sets is the goal; a speed beside a size or an accuracy drop is a further limit."""
TITLES = {
    "size": "size of the file, as a part of that in float",
    "average_bits": "bits per weight, on average",
    "bops": "bit operations, as a part of those in float",
    "speed": "predicted speed, as a multiple of that in float",
}


@dataclass(frozen=True)
class Point:
    """One plan of the trade-off.

    Attributes:
        name: ``W8A8``, ``W4A8`` or ``W4A4`` for equal bits everywhere, ``chosen``, or empty.
        rise: Expected rise of the loss.
        size: Size of the file, relative to that of the float file.
        average_bits: Bits per weight, on average; 32 in float.
        bops: Bit operations, relative to those of the float model.
        speed: Predicted speed, as a multiple of the float model's; NaN where no times were measured.
    """

    name: str
    rise: float
    size: float
    average_bits: float
    bops: float
    speed: float = math.nan


@dataclass(frozen=True)
class LayerChoice:
    """What a budget has chosen for one layer.

    Attributes:
        layer: Its name.
        form: ``float``, ``weight-only`` or ``INT8``.
        weights: Bits of its weights.
        activations: Bits of what it reads, 32 where that is not rounded.
        bytes: What its group's weights take in the file.
        rise: Expected rise of the loss by its group's weights.
        reason: What fewer bits would save and cost, or why there was nothing to choose.
        seconds: What its group takes of one run, conversions apart; NaN where it was not measured.
    """

    layer: str
    form: str
    weights: int
    activations: int
    bytes: float
    rise: float
    reason: str
    seconds: float = math.nan


@dataclass
class BudgetPlan:
    """What a budget has chosen.

    Attributes:
        goal: Which goal was set.
        limit: Its value.
        layers: By layer.
        tensors: Bits of each rounded tensor, by its quantizer.
        rules: The rules that make a recipe this plan.
        chosen: Where the plan is on the trade-off.
        curve: The best plans at other limits.
        uniform: Those of equal bits everywhere.
        loss: What the sensitivities are of: ``loss`` or ``divergence``.
        size_bytes: Bytes of the file: as an export of this plan measured it, or, without one, as it is estimated.
        float_bytes: Bytes of the file with nothing quantized, likewise.
        measured: Whether an export has measured it.
        metric: With ``accuracy_drop``: what each validated plan of the trade-off came to, by its size.
        speed_limit: The speed that it must have; `None`: any.
        seconds: What one run of it is predicted to take; NaN where no times were measured.
        float_seconds: What the float model takes, likewise.
        speed_curve: The best plans at other speeds.
        size_curve: The best plans at other sizes, where the curve is of speeds.
        by: By what the curve was gone through with ``accuracy_drop``: ``size`` or ``speed``.
        times: The table of layer times that this was predicted from.
        model: What any choice takes by it.
    """

    goal: str
    limit: float
    layers: list[LayerChoice]
    tensors: dict[str, int]
    rules: list[LayerRule]
    chosen: Point
    curve: list[Point]
    uniform: list[Point]
    loss: str = "loss"
    size_bytes: float = 0.0
    float_bytes: float = 0.0
    measured: bool = False
    metric: dict[str, float] = field(default_factory=dict)
    speed_limit: float | None = None
    seconds: float = math.nan
    float_seconds: float = math.nan
    speed_curve: list[Point] = field(default_factory=list)
    size_curve: list[Point] = field(default_factory=list)
    by: str = "size"
    times: LayerTimes | None = None
    model: SpeedModel | None = None

    def settings(self, base: Settings) -> Settings:
        """A recipe with this plan in it."""
        planned = load_settings(base)
        planned.layer_settings = [rule for rule in planned.layer_settings if rule.by != "budget"] + list(self.rules)
        planned.global_quantization_settings.skip_tail_quantization = False
        return planned

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for files and reports; the table of layer times is in a file of its own."""
        plain = asdict(replace(self, rules=[], times=None, model=None))
        return {key: value for key, value in plain.items() if key not in ("rules", "times", "model")}


def budget_rules(settings: Settings) -> list[LayerRule]:
    """The rules in a recipe that a budget has chosen."""
    return [rule for rule in settings.layer_settings if rule.by == "budget"]


def goal_of(settings: BudgetSettings) -> tuple[str, float] | None:
    """The goal that a recipe sets; `None` if it sets none."""
    return next(((goal, float(value)) for goal in GOALS if (value := getattr(settings, goal)) is not None), None)
