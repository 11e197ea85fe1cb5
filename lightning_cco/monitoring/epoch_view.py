"""What loggers are shown of an epoch: texts, tables, curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
    texts = {"cco/summary": as_code("\n".join(summary))}
    texts["cco/sensitivity"] = tables.markdown_table(tables.SENSITIVITY_HEADER, rows, of=len(report.main))
    if suggested is not None:
        texts["cco/suggestions"] = as_code(suggested)
    if levels:
        texts["cco/levels"] = tables.markdown_table(tables.LEVELS_HEADER, tables.levels_rows(levels)[: tables.MOST_ROWS])
    return texts


def epoch_tables(
    plan: QuantizationPlan, report: SensitivityReport, levels: Mapping[str, LayerLevels]
) -> dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]]:
    """Header and rows by tag, of the layers that are the most sensitive."""
    shown: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {
        "cco/sensitivity": (tables.SENSITIVITY_HEADER, tables.sensitivity_rows(report, plan)[: tables.MOST_ROWS])
    }
    if levels:
        shown["cco/levels"] = tables.LEVELS_HEADER, tables.levels_rows(levels)[: tables.MOST_ROWS]
    return shown


def epoch_values(step: int, report: SensitivityReport, levels: Mapping[str, LayerLevels], followed: Sequence[str]) -> Payload:
    """The histogram of all sensitivities, and the curves of the layers that are followed."""
    qs = {name: entry.qs for name, entry in report.main.items()}
    scalars = {f"cco_qs/{printable(name)}": qs[name] for name in followed if name in qs}
    for name in followed:
        if name in levels:
            shares = {kind: share for kind, share in vars(levels[name]).items() if not math.isnan(share)}
            scalars |= {f"cco_{kind}/{printable(name)}": share for kind, share in shares.items()}
    return Payload(step, histograms={"cco/qs": list(qs.values())}, scalars=scalars)
