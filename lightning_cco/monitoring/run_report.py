"""The summary of a run, read back from the files that it has written."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_cco.errors import CCOError
from lightning_cco.monitoring.report_files import PAGE
from lightning_cco.monitoring.sensitivity_csv import HEADER
from lightning_cco.monitoring.tables import text_table
from lightning_cco.names import printable
from lightning_cco.number_format import figure

_SHOWN = ("layer", "module", "qs", "relative", "sqnr_db", "varying_sqnr_db", "accumulated_qs")
_TITLES = ("layer", "module", "QS", "relative", "SQNR dB", "varying dB", "accumulated QS")  # those of the table in the log


def run_report(folder: str | Path, most: int = 10) -> str:
    """Summarize each run in a folder: decisions, sensitivities of the last epoch, suggestions, exported files.

    Args:
        folder: A log folder, or the ``cco`` folder in it.
        most: How many layers at most, the most sensitive first.

    Raises:
        CCOError: No run has written there.
    """
    base = Path(folder)
    runs = sorted({path.parent for name in ("resolved_recipe.yaml", "sensitivity.csv") for path in base.rglob(name)})
    if not runs:
        what = "has no resolved_recipe.yaml or sensitivity.csv, nor has a folder in it" if base.is_dir() else "is no folder"
        raise CCOError(
            f"'{printable(folder)}' {what}. Expected the log folder of a run with CCOCallback, such as lightning_logs/version_0."
        )
    return "\n\n".join("\n".join(_lines(run, most)) for run in runs)


def _lines(run: Path, most: int) -> Iterator[str]:
    yield f"Run: {printable(run)}"
    if (run / PAGE).is_file():
        yield f"Page: {printable((run / PAGE).absolute())} (open it in a browser; it needs no network)"
    if (run / "layers.txt").is_file():
        yield f"Layers: {printable(_first_line(run / 'layers.txt'))}"
    if (run / "resolved_recipe.yaml").is_file():
        yield from _decisions(run / "resolved_recipe.yaml")
    if (run / "sensitivity.csv").is_file():
        yield from _sensitivities(run / "sensitivity.csv", most)
    if (run / "suggested_skips.yaml").is_file():
        rules = _yaml_of(run / "suggested_skips.yaml").get("layer_settings") or []
        yield f"Suggested skips: {', '.join(printable(rule.get('match', '')) for rule in rules) or 'none'}"
    for path in sorted(run.parent.rglob("*export_report.json")):
        yield from _file(path)


def _yaml_of(path: Path) -> Mapping[str, Any]:
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CCOError(f"'{printable(path)}' can't be read: {type(error).__name__}: {error}") from error
    return found if isinstance(found, Mapping) else {}


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline(1000).strip()


def _decisions(path: Path) -> Iterator[str]:
    """How many layers have weights of which bits; the reason of each stands in the recipe itself."""
    rules = _yaml_of(path).get("layer_settings") or []
    skipped = [rule for rule in rules if rule.get("skip_quantization") is True]
    bits = Counter(f"W{rule['weights_num_bits']}" for rule in rules if rule not in skipped and rule.get("weights_num_bits"))
    weights = ", ".join(f"{count} {name}" for name, count in sorted(bits.items())) or "none"
    yield f"Integer weights: {weights}"


def _sensitivities(path: Path, most: int) -> Iterator[str]:
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = [row for row in csv.DictReader(file) if (row.get("epoch") or "").isdigit() and None not in row.values()]
    if not rows:
        yield "No epoch was measured."
        return
    last = max(int(row["epoch"]) for row in rows)
    now = [row for row in rows if int(row["epoch"]) == last]
    now.sort(key=lambda row: -_number(row["qs"]))
    cells = [[_cell(name, row[name]) for name in _SHOWN] for row in now[:most]]
    assert set(_SHOWN) <= set(HEADER)
    yield f"Quantization Sensitivity (QS) at the end of epoch {last}, the most sensitive layers first:"
    yield text_table(list(_TITLES), cells, right=range(2, len(_SHOWN)))
    if len(now) > most:
        yield f"… and {len(now) - most} less sensitive layers"


def _cell(name: str, text: str) -> str:
    """A value of the file, as the log shows it."""
    if name in ("layer", "module") or not text:
        return text or "-"
    value = _number(text)
    if not math.isfinite(value):
        return figure(value)
    return f"{100 * value:.2f}%" if name == "relative" else f"{value:.1f}" if name.endswith("_db") else figure(value)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _file(path: Path) -> Iterator[str]:
    """What the check of an exported file found."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        yield f"File: {printable(report['path'])}, {report['size_bytes']:,} bytes, {report['size_ratio']:.3f} of the float parameters"
        if report["batches"]:
            yield f"  SQNR {report['sqnr_db']:.1f} dB; in INT8: {_nodes(report['integer_nodes'])}; in float: {_nodes(report['float_nodes'])}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"File: '{printable(path)}' can't be read: {type(error).__name__}: {error}"


def _nodes(nodes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(nodes.items())) or "nothing"
