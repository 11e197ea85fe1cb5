"""The loss sensitivities of an epoch, for people: a table, a heat map, and all of them as a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

from lightning_cco.loss_sensitivity import LossSensitivityReport
from lightning_cco.monitoring.heat_map import heat_map
from lightning_cco.monitoring.history import History
from lightning_cco.monitoring.sensitivity_csv import SensitivityCsv
from lightning_cco.monitoring.tables import text_table
from lightning_cco.names import csv_cell
from lightning_cco.number_format import badness, figure
from lightning_cco.quantization.plan import QuantizationPlan

CSV_HEADER = ["epoch", "layer", "module", "rounded", "bits", "loss_rise", "slope", "planned"]


class LossSensitivityCsv(SensitivityCsv):
    """``loss_sensitivity.csv``: of every epoch each weight and each activation at each number of bits.

    Args:
        path: The file.
        earlier: The file that a resumed run goes on from; `None`: the table starts anew.
    """

    header = CSV_HEADER

    def write_losses(self, epoch: int, report: LossSensitivityReport, plan: QuantizationPlan) -> None:
        """Add an epoch.

        Raises:
            OSError: The file can't be written.
        """
        self.write_rows(epoch, _rows(epoch, report, plan))


def _rows(epoch: int, report: LossSensitivityReport, plan: QuantizationPlan) -> Iterable[Sequence[str]]:
    planned = {str(key): spec.num_bits for key, spec in plan.tensors.items()}
    for rounding, slope in report.slopes.items():
        part, name, bits = rounding
        layer = name if name in plan.graph else next((str(key.layer) for key in plan.tensors if str(key) == name), name)
        now = plan.decisions[layer].weights_num_bits if part == "weights" and layer in plan.decisions else planned.get(name)
        path = plan.graph[layer].path if layer in plan.graph else ""
        rise = getattr(report, part)[name][bits]
        yield [str(epoch), csv_cell(name), csv_cell(path), part, str(bits), f"{rise:.9g}", f"{slope:.9g}", str(int(now == bits))]


def loss_header(report: LossSensitivityReport) -> list[str]:
    """Titles of the table."""
    bits = sorted({count for by_bits in report.weights.values() for count in by_bits})
    return ["layer", "module", "bits", "rise now", *(f"W{count}" for count in bits)]


def loss_rows(report: LossSensitivityReport, plan: QuantizationPlan) -> list[list[str]]:
    """One row per measured layer, those that cost most first: name, module, bits, the expected rise now, and that of its weights at each number of bits."""
    rises = report.rises(plan)
    columns = sorted({count for by_bits in report.weights.values() for count in by_bits})
    rows = []
    for name in sorted(rises, key=lambda name: -badness(rises[name])):
        decision, weights = plan.decisions[name], report.weights.get(name, {})
        cells = [figure(weights[count], 3) if count in weights else "-" for count in columns]
        rows.append([name, plan.graph[name].path or "-", decision.bits() or "-", figure(rises[name], 3), *cells])
    return rows


def loss_table(report: LossSensitivityReport, plan: QuantizationPlan, most: int = 5) -> str:
    """The layers whose rounding costs most, as text."""
    rows, header = loss_rows(report, plan), loss_header(report)
    total = sum(rise for rise in report.rises(plan).values() if math.isfinite(rise))
    title = f"Expected rise of the {report.loss} by rounding each layer alone; {figure(total, 3)} in all; the most costly layers first"
    table = f"{title}\n{text_table(header, rows[:most], right=range(3, len(header)))}"
    return table if len(rows) <= most else f"{table}\n… and {len(rows) - most} less costly layers (all are in loss_sensitivity.csv)"


def loss_heat_map(past: History, threshold: float | None, suggested: Iterable[str], paths: Mapping[str, str]) -> Image.Image:
    """Draw the expected rise by layer and epoch."""
    return heat_map(past.epochs, threshold, set(suggested), "Expected rise of the loss", paths)
