"""The summary of an epoch as Markdown, for the text pages of loggers: metrics, suggestions, the plan with its reasons, the most sensitive layers."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_cco.monitoring import tables
from lightning_cco.monitoring.epoch import EpochMetrics, EpochResults
from lightning_cco.monitoring.metric_modes import best_of
from lightning_cco.monitoring.plan_log import plan_lines
from lightning_cco.names import last_parts, markdown_cell
from lightning_cco.number_format import figure

_MOST = 10  # layers in the table
_PATH = 40  # characters of a module's path: TensorBoard breaks the titles of the other columns within words where one takes the width


def summary_text(results: EpochResults, extremes: Mapping[str, Mapping[str, float]]) -> str:
    """Write an epoch down.

    Args:
        results: The epoch.
        extremes: By metric: ``lowest``, ``lowest_epoch``, ``highest``, ``highest_epoch``.
    """
    plan, report = results.plan, results.report
    first, *rest = plan_lines(plan)
    parts = [f"**Epoch {results.epoch}: {markdown_cell(first)}**"]
    if results.metrics.values:
        parts.append(tables.markdown_table(["metric", "original", "calibrated", "now", "best"], _metrics(results.metrics, extremes)))
    suggested, *skips = tables.suggestion_lines(results.suggestions, results.settings)
    parts += [markdown_cell(suggested), _listed(skips)] if skips else [markdown_cell(suggested)]
    rows = [[layer, last_parts(path, _PATH), *figures] for layer, path, *figures in tables.sensitivity_rows(report, plan)]
    parts += ["### What is quantized, and what is not", _listed(rest)]
    parts += ["### The most sensitive layers", tables.markdown_table(tables.SENSITIVITY_HEADER, rows[:_MOST], of=len(rows))]
    return "\n\n".join(parts)


def _metrics(metrics: EpochMetrics, extremes: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    rows = []
    for name, value in metrics.values.items():
        ends, best = extremes[name], best_of(extremes[name], metrics.directions.get(name))
        rows.append(
            [
                name,
                *(figure(known[name]) if name in known else "-" for known in (metrics.original, metrics.calibrated)),
                figure(value),
                f"{figure(best[0])} (epoch {best[1]})" if best else f"{figure(ends['lowest'])} to {figure(ends['highest'])}",
            ]
        )
    return rows


def _listed(lines: list[str]) -> str:
    shown = [markdown_cell(line.strip()) for line in lines]
    # A line that begins with a sharp would be a heading.
    return "\n".join(f"- \\{line}" if line.startswith("#") else f"- {line}" for line in shown)
