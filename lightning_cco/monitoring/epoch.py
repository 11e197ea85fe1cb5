"""One epoch of a run: what was measured of its model, and its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_cco.level_use import LayerLevels
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.report_page.facts import ModelFacts
from lightning_cco.sensitivity import SensitivityReport
from lightning_cco.settings import Settings
from lightning_cco.suggestions import Suggestion
from lightning_cco.tensor_views import TensorViews


@dataclass(frozen=True)
class EpochMetrics:
    """The metrics of an epoch, and those of the same names that it is compared with.

    Attributes:
        values: Those of the epoch.
        original: Those of the float model before training.
        calibrated: Those after the calibration, before training.
        directions: ``min`` or ``max`` by metric, where it is known which is better.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    original: Mapping[str, float] = field(default_factory=dict)
    calibrated: Mapping[str, float] = field(default_factory=dict)
    directions: Mapping[str, str] = field(default_factory=dict)

    @property
    def in_both(self) -> dict[str, float]:
        """Metrics of the float model that the epoch has, too."""
        return {name: value for name, value in self.original.items() if name in self.values}


@dataclass(frozen=True)
class EpochResults:
    """What is shown of an epoch.

    Attributes:
        epoch: Its number, from 0.
        step: Global step at its end.
        plan: What was quantized.
        settings: The recipe; the suggestions are merged with its rules.
        report: The Quantization Sensitivity of each layer.
        metrics: Its metrics.
        suggestions: What to skip.
        levels: How each layer uses its levels.
        views: Ranges and histograms.
        facts: The model, and how many weights it has; `None`: as at the start.
    """

    epoch: int
    step: int
    plan: QuantizationPlan
    settings: Settings
    report: SensitivityReport
    metrics: EpochMetrics = field(default_factory=EpochMetrics)
    suggestions: Sequence[Suggestion] = ()
    levels: Mapping[str, LayerLevels] = field(default_factory=dict)
    views: TensorViews = field(default_factory=TensorViews)
    facts: ModelFacts | None = None

    @property
    def qs(self) -> dict[str, float]:
        """Quantization Sensitivity by layer."""
        return {name: entry.qs for name, entry in self.report.main.items()}
