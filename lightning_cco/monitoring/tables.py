"""Plain-text and Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.level_use import LayerLevels, worst_first
from lightning_cco.monitoring.epoch import EpochMetrics
from lightning_cco.monitoring.metric_modes import best_of
from lightning_cco.names import markdown_cell, printable
from lightning_cco.number_format import figure
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.sensitivity import SensitivityReport
from lightning_cco.settings import Settings
from lightning_cco.suggestions import Suggestion


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligned columns under a rule.

    Args:
        header: Titles of the columns.
        rows: As many cells each.
        right: Columns to align right.

    >>> print(text_table(["layer", "QS"], [["conv", "1.5"], ["linear", "10.0"]], right=[1]))
    layer     QS
    ------  ----
    conv     1.5
    linear  10.0
    """
    cells = [[printable(cell, _WIDEST) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in cells)])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], of: int = 0) -> str:
    """The same as Markdown, for TensorBoard's text page.

    Args:
        header: Titles of the columns.
        rows: As many cells each.
        of: How many rows there are in all, if not all are given.
    """
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(map(markdown_cell, row)) + " |" for row in rows]
    return "\n".join(lines) + (f"\n\n… and {of - len(rows)} more (all are in sensitivity.csv)" if of > len(rows) else "")


def parsed_layers(graph: LayerGraph) -> str:
    """The map from module path to layer name; inputs by the argument that they are."""
    rows = []
    for layer in graph:
        if layer.kind == "input":
            rows.append((f"(argument {layer.attributes.get('argument', '')})", layer.name, layer.kind))
        elif layer.kind != "output":
            rows.append((layer.path or "-", layer.name, layer.kind))
    return text_table(["module", "layer", "kind"], rows)


MOST_ROWS = 60  # rows of a table in a logger
_WIDEST = 120  # characters of a cell in the log


def float_layers(plan: QuantizationPlan) -> str:
    """The layers left in float, with the reason."""
    return text_table(["layer", "why"], [(name, reason) for name, reason in plan.skipped.items() if plan.counts(name)])


def sensitivity_rows(report: SensitivityReport, plan: QuantizationPlan) -> list[list[str]]:
    """One row per measured layer, worst first: name, module, QS, relative, SQNR of the output and of its batch-varying part, accumulated QS, bits."""
    rows = []
    for entry in report.worst_first():
        decision, accumulated = plan.decisions[entry.name], report.accumulated.get(entry.name)
        rows.append(
            [
                entry.name,
                plan.graph[entry.name].path or "-",
                figure(entry.qs),
                f"{100 * entry.relative:.2f}%",
                f"{entry.sqnr_db:.1f}",
                "-" if math.isnan(entry.varying_sqnr_db) else f"{entry.varying_sqnr_db:.1f}",
                figure(accumulated.qs) if accumulated else "-",
                decision.bits() or "-",
            ]
        )
    return rows


SENSITIVITY_HEADER = ["layer", "module", "QS", "relative", "SQNR dB", "varying dB", "accumulated QS", "bits"]


def sensitivity_table(report: SensitivityReport, plan: QuantizationPlan, most: int = 5) -> str:
    """The most sensitive layers as text.

    Args:
        report: What was measured.
        plan: What is quantized.
        most: How many layers at most.
    """
    rows = sensitivity_rows(report, plan)
    if not rows:
        return "Quantization Sensitivity (QS): nothing was measured, since no layer is quantized (layers.txt has the reasons)"
    title = "Quantization Sensitivity (QS): how far rounding moves a layer's output; the most sensitive layers first"
    table = f"{title}\n{text_table(SENSITIVITY_HEADER, rows[:most], right=[2, 3, 4, 5, 6])}"
    return table if len(rows) <= most else f"{table}\n… and {len(rows) - most} less sensitive layers (all are in sensitivity.csv)"


LEVELS_HEADER = ["layer", "weights clipped", "weights oscillating", "activations clipped"]


def levels_rows(levels: Mapping[str, LayerLevels]) -> list[list[str]]:
    """One row per layer: the shares of clipped and oscillating weights and of clipped activations, the largest first."""
    return [
        [name, *("-" if math.isnan(share) else f"{100 * share:.2f}%" for share in vars(shares).values())]
        for name, shares in worst_first(levels)
    ]


def levels_lines(levels: Mapping[str, LayerLevels], most: int = 5) -> list[str]:
    """The layers of which a share of at least 1 % is clipped or oscillates, as a table of text; nothing if there are none."""
    shown = {name: shares for name, shares in levels.items() if any(share >= 0.01 for share in vars(shares).values())}
    if not shown:
        return []
    rows = levels_rows(shown)
    more = [f"… and {len(rows) - most} more of at least 1 %"] if len(rows) > most else []
    title = "Use of the levels: shares that are clipped, or oscillate between two levels; the largest first"
    return ["", title, text_table(LEVELS_HEADER, rows[:most], right=[1, 2, 3]), *more]


def suggestion_lines(suggestions: Sequence[Suggestion], settings: Settings, most: int = 10) -> list[str]:
    """What the log says of suggested skips.

    Args:
        suggestions: The suggestions, worst first.
        settings: The recipe, for its thresholds.
        most: How many suggestions at most.
    """
    general = settings.global_quantization_settings
    if not suggestions:
        limits = []
        if general.automatic_skip_by == "loss":
            limit = general.loss_sensitivity_threshold
            return [
                f"Suggested skips: none; no layer's expected rise of the loss is above {limit:.4g}."
                if limit is not None
                else "Suggested skips: none; no threshold is set."
            ]
        if general.quantization_sensitivity_threshold is not None:
            limits.append(f"a QS above {figure(general.quantization_sensitivity_threshold)}")
        if general.quantization_sensitivity_relative_threshold is not None:
            limits.append(f"a relative error above {general.quantization_sensitivity_relative_threshold:.4g}")
        return [
            f"Suggested skips: none; no quantized layer has {' or '.join(limits)}."
            if limits
            else "Suggested skips: none; no threshold is set."
        ]
    what = (
        "applied from the next epoch on"
        if general.automatic_skip_quantization
        else "merge suggested_skips.yaml into the recipe to apply them"
    )
    lines = [
        f"Suggested skips ({what}):",
        *(printable(f"  {s.name}: {s.reason}{f'; {s.balance}' if s.balance else ''}") for s in suggestions[:most]),
    ]
    return lines if len(suggestions) <= most else [*lines, f"  … and {len(suggestions) - most} more"]


def metrics_table(metrics: EpochMetrics, previous: Mapping[str, float], extremes: Mapping[str, Mapping[str, float]]) -> str:
    """The end of an epoch: each metric's value, the original one, the one after calibration, the difference, the change since the last epoch, the best.

    Args:
        metrics: The epoch's. The column of those after the calibration is left out where there are none; both ends are shown where no direction is known.
        previous: Metrics of the epoch before; empty in the first.
        extremes: By metric: ``lowest``, ``lowest_epoch``, ``highest``, ``highest_epoch``.
    """
    rows = []
    original, calibrated = metrics.original, metrics.calibrated
    for name, value in metrics.values.items():
        direction = metrics.directions.get(name)
        best = best_of(extremes[name], direction)
        ends = extremes[name]
        rows.append(
            [
                name,
                figure(value),
                figure(original[name]) if name in original else "-",
                figure(calibrated[name]) if name in calibrated else "-",
                difference(value, original[name], direction) if name in original else "-",
                difference(value, previous[name], percent=False) if name in previous else "-",
                f"{figure(best[0])} (epoch {best[1]})"
                if best is not None
                else f"{figure(ends['lowest'])} to {figure(ends['highest'])} (range)",
            ]
        )
    header = ["metric", "value", "original", "calibrated", "difference", "since last epoch", "best so far"]
    if not calibrated:
        header, rows = header[:3] + header[4:], [row[:3] + row[4:] for row in rows]
    return text_table(header, rows, right=range(1, len(header) - 1))


def difference(value: float, before: float, direction: str | None = None, percent: bool = True) -> str:
    """Change from one value to another, and whether it is for the better.

    >>> difference(0.75, 0.5, "max"), difference(0.5, 0.5), difference(1.0, 0.0)
    ('+0.25 (+50.0%) better', '0', '+1')
    """
    change = value - before
    if change == 0 or math.isnan(change):
        return "0" if change == 0 else "nan"
    share = f" ({100 * change / abs(before):+.1f}%)" if before and percent else ""
    verdict = "" if direction is None else " better" if (change > 0) == (direction == "max") else " worse"
    return f"{change:+.4g}{share}{verdict}"
