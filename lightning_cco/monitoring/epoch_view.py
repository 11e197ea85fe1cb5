"""What loggers are shown of an epoch: texts, tables, curves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_cco.level_use import LayerLevels
from lightning_cco.monitoring import tables
from lightning_cco.monitoring.loggers import Payload
from lightning_cco.names import printable
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.sensitivity import SensitivityReport


def as_code(text: str) -> str:
    """A text as Markdown that is shown as it is."""
    return "\n".join(f"    {printable(line)}" for line in text.splitlines())


def epoch_texts(
    plan: QuantizationPlan, report: SensitivityReport, levels: Mapping[str, LayerLevels], summary: Sequence[str], suggested: str | None
) -> dict[str, str]:
    """Markdown by tag.

    Args:
        plan: What was quantized.
        report: What was measured.
        levels: How each layer uses its levels.
        summary: Lines of the epoch's summary.
        suggested: The recipe with the suggested skips.
    """
    rows = tables.sensitivity_rows(report, plan)[: tables.MOST_ROWS]
    texts = {"cco/epoch_summary": as_code("\n".join(summary))}
    texts["cco_details/sensitivity"] = tables.markdown_table(tables.SENSITIVITY_HEADER, rows, of=len(report.main))
    if suggested is not None:
        texts["cco/suggestions"] = as_code(suggested)
    if levels:
        texts["cco_details/levels"] = tables.markdown_table(tables.LEVELS_HEADER, tables.levels_rows(levels)[: tables.MOST_ROWS])
    return texts


def epoch_tables(
    plan: QuantizationPlan, report: SensitivityReport, levels: Mapping[str, LayerLevels]
) -> dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]]:
    """Header and rows by tag, of the layers that are the most sensitive."""
    shown: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {
        "cco_details/sensitivity": (tables.SENSITIVITY_HEADER, tables.sensitivity_rows(report, plan)[: tables.MOST_ROWS])
    }
    if levels:
        shown["cco_details/levels"] = tables.LEVELS_HEADER, tables.levels_rows(levels)[: tables.MOST_ROWS]
    return shown


def charts(metrics: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Which curves belong into one chart, by chart and by group, as TensorBoard's Custom Scalars page takes them.

    Args:
        metrics: Names of the metrics that are known of the float model, too.
    """
    by_metric = {name: ["Multiline", [f"^{re.escape(name)}$"]] for name in metrics}
    layers = {
        "QS of the most sensitive layers": ["Multiline", ["^cco_qs/"]],
        "clipped activations": ["Multiline", ["^cco_clipped_activations/"]],
        "clipped weights": ["Multiline", ["^cco_clipped_weights/"]],
        "oscillating weights": ["Multiline", ["^cco_oscillating_weights/"]],
    }
    model = {
        "Quantization Sensitivity": ["Multiline", ["^cco/qs_max$", "^cco/qs_mean$"]],
        "signal to noise of the worst layer, dB": ["Multiline", ["^cco/sqnr_min$"]],
        "layers": ["Multiline", ["^cco/num_quantized_layers$", "^cco/num_suggested_skips$"]],
    }
    groups: dict[str, dict[str, Any]] = {"metrics, beside those of the float model": by_metric, "compression": model, "layers": layers}
    return {name: group for name, group in groups.items() if group}


def epoch_values(
    step: int, report: SensitivityReport, levels: Mapping[str, LayerLevels], followed: Sequence[str], original: Mapping[str, float]
) -> Payload:
    """The histogram of all sensitivities, the curves of the layers that are followed, and the float model's metrics as lines."""
    qs = {name: entry.qs for name, entry in report.main.items()}
    scalars = {f"cco_qs/{printable(name)}": qs[name] for name in followed if name in qs}
    for name in followed:
        if name in levels:
            shares = {kind: share for kind, share in vars(levels[name]).items() if not math.isnan(share)}
            scalars |= {f"cco_{kind}/{printable(name)}": share for kind, share in shares.items()}
    return Payload(step, histograms={"cco_details/qs": list(qs.values())}, scalars=scalars, original=dict(original))
