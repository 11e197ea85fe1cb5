"""What loggers are shown of an epoch: texts, tables, curves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_cco.monitoring import tables, tags
from lightning_cco.monitoring.epoch import EpochResults
from lightning_cco.monitoring.loggers import Payload
from lightning_cco.monitoring.summary_text import summary_text
from lightning_cco.names import printable


def as_code(text: str) -> str:
    """A text as Markdown that is shown as it is."""
    return "\n".join(f"    {printable(line)}" for line in text.splitlines())


def epoch_texts(results: EpochResults, extremes: Mapping[str, Mapping[str, float]], suggested: str | None) -> dict[str, str]:
    """Markdown by tag.

    Args:
        results: The epoch.
        extremes: The best of each metric; see `summary_text`.
        suggested: The recipe with the suggested skips.
    """
    rows = tables.sensitivity_rows(results.report, results.plan)[: tables.MOST_ROWS]
    texts = {tags.SUMMARY: summary_text(results, extremes)}
    texts[tags.detail("sensitivity")] = tables.markdown_table(tables.SENSITIVITY_HEADER, rows, of=len(results.report.main))
    if suggested is not None:
        texts[tags.SUGGESTIONS] = as_code(suggested)
    if results.levels:
        levels = tables.levels_rows(results.levels)[: tables.MOST_ROWS]
        texts[tags.detail("levels")] = tables.markdown_table(tables.LEVELS_HEADER, levels)
    return texts


def epoch_tables(results: EpochResults) -> dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]]:
    """Header and rows by tag, of the layers that are the most sensitive."""
    rows = tables.sensitivity_rows(results.report, results.plan)[: tables.MOST_ROWS]
    shown: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {tags.detail("sensitivity"): (tables.SENSITIVITY_HEADER, rows)}
    if results.levels:
        shown[tags.detail("levels")] = tables.LEVELS_HEADER, tables.levels_rows(results.levels)[: tables.MOST_ROWS]
    return shown


def charts(metrics: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Which curves belong into one chart, by chart and by group, as TensorBoard's Custom Scalars page takes them.

    Args:
        metrics: Names of the metrics that are known of the float model, too.
    """
    by_metric = {name: ["Multiline", [f"^{re.escape(name)}$"]] for name in metrics}
    layers = {
        "QS of the most sensitive layers": ["Multiline", ["^cco-qs/"]],
        "clipped activations": ["Multiline", ["^cco-clipped_activations/"]],
        "clipped weights": ["Multiline", ["^cco-clipped_weights/"]],
        "oscillating weights": ["Multiline", ["^cco-oscillating_weights/"]],
    }
    model = {
        "Quantization Sensitivity": ["Multiline", ["^cco/qs_max$", "^cco/qs_mean$"]],
        "signal to noise of the worst layer, dB": ["Multiline", ["^cco/sqnr_min$"]],
        "layers": ["Multiline", ["^cco/num_quantized_layers$", "^cco/num_suggested_skips$"]],
    }
    groups: dict[str, dict[str, Any]] = {"metrics, beside those of the float model": by_metric, "compression": model, "layers": layers}
    return {name: group for name, group in groups.items() if group}


def epoch_values(results: EpochResults, followed: Sequence[str]) -> Payload:
    """The histogram of all sensitivities, the curves of the layers that are followed, and the float model's metrics as lines."""
    qs, levels = results.qs, results.levels
    scalars = {tags.of_layer("qs", name): qs[name] for name in followed if name in qs}
    for name in followed:
        if name in levels:
            shares = {kind: share for kind, share in vars(levels[name]).items() if not math.isnan(share)}
            scalars |= {tags.of_layer(kind, name): share for kind, share in shares.items()}
    return Payload(results.step, histograms={tags.detail("qs"): list(qs.values())}, scalars=scalars, original=results.metrics.in_both)
