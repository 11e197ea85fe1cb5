"""Plain-text and Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.sensitivity import SensitivityReport
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
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in cells)])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same as Markdown, for TensorBoard's text page."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def number(value: float) -> str:
    """A figure as people read it: four significant digits, no exponent where none is needed."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def parsed_layers(graph: LayerGraph) -> str:
    """The map from module path to layer name."""
    rows = [(layer.path or "-", layer.name, layer.kind) for layer in graph if layer.kind not in ("input", "output")]
    return text_table(["module", "layer", "kind"], rows)


def plan_lines(plan: QuantizationPlan) -> list[str]:
    """What the log says of a plan: the automatic skips, the counts, the bits, the layers left in float with reasons, the boundaries."""
    lines = []
    tail = [name for name, reason in plan.skipped.items() if reason.startswith("tail")]
    if tail:
        names = ", ".join(f"'{name}'" for name in tail)
        lines.append(f"Skipped Quantization automatically for the Tail of the model: {names}")
    lines.append(f"# of all Layers      : {plan.counted}")
    lines.append(f"# of Quantized Layers: {len(plan.quantized)}")
    for name, decision in plan.decisions.items():
        if decision.weights_num_bits is not None:
            lines.append(f"'{name}': using {decision.weights_num_bits} bits for Weight Quantization")
    others = {name: reason for name, reason in plan.skipped.items() if name not in tail}
    by_reason: dict[str, list[str]] = {}
    for name, reason in others.items():
        by_reason.setdefault(reason, []).append(name)
    lines += [f"Not quantized ({reason}): {', '.join(group)}" for reason, group in by_reason.items()]
    lines += [f"{boundary.direction}: from '{boundary.source}' to '{boundary.destination}'" for boundary in plan.boundaries]
    return lines


def sensitivity_rows(report: SensitivityReport, plan: QuantizationPlan) -> list[list[str]]:
    """One row per measured layer, worst first: name, module, QS, relative, SQNR, accumulated QS, bits."""
    rows = []
    for entry in report.worst_first():
        decision, accumulated = plan.decisions[entry.name], report.accumulated.get(entry.name)
        bits = "/".join(
            f"{letter}{bits}"
            for letter, bits in (("W", decision.weights_num_bits), ("A", decision.activations_num_bits))
            if bits is not None
        )
        rows.append(
            [
                entry.name,
                plan.graph[entry.name].path or "-",
                number(entry.qs),
                f"{100 * entry.relative:.2f}%",
                f"{entry.sqnr_db:.1f}",
                number(accumulated.qs) if accumulated else "-",
                bits or "-",
            ]
        )
    return rows


SENSITIVITY_HEADER = ["layer", "module", "QS", "relative", "SQNR dB", "accumulated QS", "bits"]


def sensitivity_table(report: SensitivityReport, plan: QuantizationPlan, most: int = 10) -> str:
    """The most sensitive layers as text."""
    rows = sensitivity_rows(report, plan)
    table = text_table(SENSITIVITY_HEADER, rows[:most], right=[2, 3, 4, 5])
    return table if len(rows) <= most else f"{table}\n… and {len(rows) - most} less sensitive layers (all are in sensitivity.csv)"


def suggestion_lines(suggestions: Sequence[Suggestion]) -> list[str]:
    """What the log says of suggested skips."""
    if not suggestions:
        return ["Suggested skips: none, every layer is below the threshold."]
    return ["Suggested skips:", *(f"  {s.name}: {s.reason}" for s in suggestions)]


def metrics_table(
    epoch: int, values: Mapping[str, float], original: Mapping[str, float], extremes: Mapping[str, Mapping[str, float]]
) -> str:
    """The end of an epoch: each metric's value, original value, difference, and the lowest and highest so far with their epochs.

    Args:
        epoch: Number of the epoch, from 0.
        values: Metrics of the epoch.
        original: Metrics of the float model before training.
        extremes: By metric: ``lowest``, ``lowest_epoch``, ``highest``, ``highest_epoch``.
    """
    rows = []
    for name, value in values.items():
        before = original.get(name)
        best = extremes[name]
        rows.append(
            [
                name,
                number(value),
                number(before) if before is not None else "-",
                difference(value, before) if before is not None else "-",
                f"{number(best['lowest'])} (epoch {int(best['lowest_epoch'])})",
                f"{number(best['highest'])} (epoch {int(best['highest_epoch'])})",
            ]
        )
    header = ["metric", "value", "original", "difference", "lowest so far", "highest so far"]
    return f"Summary of epoch {epoch}\n{text_table(header, rows, right=[1, 2, 3])}"


def difference(value: float, before: float) -> str:
    """Change from one value to another, absolute and in per cent.

    >>> difference(0.75, 0.5), difference(0.5, 0.5), difference(1.0, 0.0)
    ('↗ +0.25 (+50.0%)', '= 0', '↗ +1')
    """
    change = value - before
    if change == 0 or math.isnan(change):
        return "= 0" if change == 0 else "nan"
    percent = f" ({100 * change / abs(before):+.1f}%)" if before else ""
    return f"{'↗' if change > 0 else '↘'} {change:+.4g}{percent}"
