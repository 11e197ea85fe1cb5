"""Shows a compression as it goes: the log, files, loggers. It keeps the history that heat map and tables need.

Nothing here ends a training: what can't be drawn, written or shown is one warning, and on it goes.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from lightning_cco.budget.plan import BudgetPlan
from lightning_cco.export.report import ExportReport
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.level_use import LayerLevels
from lightning_cco.loss_sensitivity import LossSensitivityReport
from lightning_cco.monitoring import tables
from lightning_cco.monitoring.epoch_view import as_code, charts, epoch_tables, epoch_texts, epoch_values
from lightning_cco.monitoring.graph_def import graph_def
from lightning_cco.monitoring.heat_map import heat_map
from lightning_cco.monitoring.history import History, worth_showing
from lightning_cco.monitoring.loggers import Payload, show
from lightning_cco.monitoring.loss_view import LossSensitivityCsv, loss_header, loss_heat_map, loss_rows, loss_table
from lightning_cco.monitoring.pictures import Pictures
from lightning_cco.monitoring.plan_log import layers_text, plan_lines, start_lines
from lightning_cco.monitoring.report_files import ReportFiles
from lightning_cco.monitoring.resolved import resolved_yaml
from lightning_cco.monitoring.run_folder import RunFolder
from lightning_cco.monitoring.sensitivity_csv import SensitivityCsv
from lightning_cco.monitoring.trade_off import HEADER, budget_csv, budget_lines, layer_rows, trade_off
from lightning_cco.names import printable
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.report_page.facts import ModelFacts
from lightning_cco.sensitivity import SensitivityReport
from lightning_cco.settings import Settings
from lightning_cco.suggestions import Suggestion, suggestions_yaml
from lightning_cco.tensor_views import TensorViews

_FILES = ("suggested_skips.yaml", "sensitivity.csv", "heat_map.png", "resolved_recipe.yaml", "layers.txt")
_FOLLOWED = 30  # layers with a curve of their own: as many as a page can show


class Monitor:
    """Writes what a user sees of one run.

    Files in ``folder``: ``overview.{svg,png}``, ``model_post_preprocessing.{svg,png,dot}`` (both redrawn each
    epoch), ``model_init.{svg,png,dot}``, ``layers.txt``, ``resolved_recipe.yaml``, ``suggested_skips.yaml``, ``sensitivity.csv``, ``heat_map.png``,
    ``report.html`` (one page of all, with ``report.json`` and ``model_explorer*.json``); with a budget ``trade_off.png``, ``budget.csv``,
    ``budget.json``; with a speed ``layer_times.json``.
    Loggers get each of the first 20 epochs' pictures and tables, then ever fewer, and the last ones.

    Args:
        folder: Where files go; made if missing, also when somebody removes it.
        loggers: The Trainer's loggers.
        enabled: Whether this process writes (rank 0).
        draw: Whether to draw the layer graph.
    """

    def __init__(self, folder: Path | str, loggers: Sequence[Any] = (), enabled: bool = True, draw: bool = True) -> None:
        self.folder, self.loggers, self.enabled, self.draw = RunFolder(folder), list(loggers), enabled, draw
        self.past = History()
        self.past_losses = History()
        self.past_metrics = History()
        self._rises: dict[str, float] = {}
        self._csv = SensitivityCsv(self.folder.path / "sensitivity.csv")
        self._loss_csv = LossSensitivityCsv(self.folder.path / "loss_sensitivity.csv")
        self._step = 0
        self._not_shown: Payload | None = None
        self._pictures = Pictures(self.folder, self.loggers)
        self._report = ReportFiles(self.folder)

    def on_start(self, graph: LayerGraph, plan: QuantizationPlan, facts: ModelFacts | None = None) -> None:
        """Say what was captured and planned, draw it, write the resolved recipe.

        Args:
            graph: The layers.
            plan: What is quantized.
            facts: The model, and how many weights it has.
        """
        if not self.enabled:
            return
        self.folder.open()
        with self.folder.unharmed("the plan"):
            _say("\n".join(start_lines(graph, plan)))
        self._report.state.facts = facts or ModelFacts()
        self._write_plan(plan)
        if self.draw:
            self._pictures.draw_graph(graph)
            self._pictures.draw_plan(plan, {}, {}, step=0, when="before training", to_loggers=True)
        _say(f"Pictures, recipes and the report page (report.html): {printable(self.folder.path)}")

    def on_plan(self, plan: QuantizationPlan) -> None:
        """Say what a plan does, and write it as a recipe that can be fed back."""
        if not self.enabled:
            return
        with self.folder.unharmed("the plan"):
            _say("\n".join(plan_lines(plan)))
        self._write_plan(plan)

    def _write_plan(self, plan: QuantizationPlan, budget: BudgetPlan | None = None) -> None:
        self.folder.write("resolved_recipe.yaml", lambda: resolved_yaml(plan, budget))
        self.folder.write("layers.txt", lambda: layers_text(plan))
        self._report.update(plan=plan)

    def on_budget(self, budget: BudgetPlan, step: int) -> None:
        """Say what a budget has chosen; write the trade-off as ``trade_off.png``, the layers as ``budget.csv``, and all of it as ``budget.json``."""
        if not self.enabled:
            return
        with self.folder.unharmed("the budget"):
            _say("\n".join(budget_lines(budget)))
        self.folder.write("budget.json", lambda: json.dumps(budget.to_dict(), indent=1))
        self.folder.write("budget.csv", lambda: budget_csv(budget))
        names = ["budget.csv", "budget.json", "trade_off.png"]
        if (times := budget.times) is not None:
            self.folder.write("layer_times.json", times.to_json)
            names.append("layer_times.json")
        picture = self.folder.write("trade_off.png", lambda: _png(trade_off(budget)))
        if self._report.state.plan is not None:
            self._write_plan(self._report.state.plan, budget)
        self._report.update(budget=budget)
        with self.folder.unharmed("what goes to the loggers"):
            rows = layer_rows(budget)
            text = tables.markdown_table(HEADER, rows[: tables.MOST_ROWS], of=len(rows))
            images = {} if picture is None else {"cco/trade_off": picture}
            files = [self.folder.path / name for name in names]
            show(self.loggers, Payload(step, texts={"cco/budget": text}, images=images, files=files))

    def on_losses(self, epoch: int, step: int, plan: QuantizationPlan, losses: LossSensitivityReport, settings: Settings) -> None:
        """Show the loss sensitivities of an epoch; before `on_epoch`, whose picture has them too."""
        if not self.enabled:
            return
        rises = self._rises = losses.rises(plan)
        self.past_losses.add(epoch, rises, {})
        self._report.state.losses = losses
        with self.folder.unharmed("the loss sensitivities"):
            _say(loss_table(losses, plan))
        if self.folder.on_disk:
            with self.folder.unharmed(self._loss_csv.path):
                self._loss_csv.write_losses(epoch, losses, plan)
        threshold = settings.global_quantization_settings.loss_sensitivity_threshold
        picture = self.folder.write("loss_heat_map.png", lambda: _png(loss_heat_map(self.past_losses, threshold, ())))
        with self.folder.unharmed("what goes to the loggers"):
            rows = loss_rows(losses, plan)
            light = {f"cco_loss/{printable(name)}": rise for name, rise in list(rises.items())[:_FOLLOWED]}
            if not worth_showing(self.past_losses.count):
                show(self.loggers, Payload(step, scalars=light))
                return
            text = tables.markdown_table(loss_header(losses), rows[: tables.MOST_ROWS], of=len(rows))
            images = {} if picture is None else {"cco_details/loss_heat_map": picture}
            files = [self._loss_csv.path, self.folder.path / "loss_heat_map.png"]
            show(self.loggers, Payload(step, texts={"cco_details/loss_sensitivity": text}, images=images, files=files, scalars=light))

    def on_float_epoch(self, epoch: int, metrics: Mapping[str, float], original: Mapping[str, float]) -> None:
        """Show the metrics of an epoch before fake-quantization has started; the best ones are those of the compressed model alone."""
        if not self.enabled:
            return
        with self.folder.unharmed("the epoch's summary"):
            before = {name: f" (original {original[name]:.4g})" for name in metrics if name in original}
            said = [f"  {name}: {value:.4g}{before.get(name, '')}" for name, value in metrics.items()]
            _say("\n".join([f"Summary of epoch {epoch}, trained in float", *said]))

    def on_epoch(
        self,
        epoch: int,
        step: int,
        plan: QuantizationPlan,
        report: SensitivityReport,
        suggestions: Sequence[Suggestion],
        settings: Settings,
        metrics: Mapping[str, float],
        original: Mapping[str, float],
        directions: Mapping[str, str] | None = None,
        calibrated: Mapping[str, float] | None = None,
        levels: Mapping[str, LayerLevels] | None = None,
        views: TensorViews | None = None,
        facts: ModelFacts | None = None,
    ) -> None:
        """Show an epoch.

        Args:
            epoch: Its number, from 0.
            step: Global step.
            plan: What was quantized.
            report: What was measured.
            suggestions: What to skip.
            settings: The recipe; the suggestions are merged with its rules.
            metrics: The epoch's metrics.
            original: Those of the float model before training.
            directions: ``min`` or ``max`` by metric, where it is known which is better.
            calibrated: Those after the calibration, before training.
            levels: How each layer uses its levels.
            views: Ranges and histograms.
            facts: The model, and how many weights it has.
        """
        if not self.enabled:
            return
        self._step = step
        past, first = self.past, self.past.count == 0
        qs = {name: entry.qs for name, entry in report.main.items()}
        past.add(epoch, {name: qs[name] for name in plan.graph.names if name in qs}, metrics)
        said: list[str] = []
        with self.folder.unharmed("the epoch's summary"):
            said = [f"Summary of epoch {epoch}"]
            if metrics:
                said.append(tables.metrics_table(metrics, original, past.previous, past.extremes, directions or {}, calibrated or {}))
            said += [
                "",
                tables.sensitivity_table(report, plan),
                *tables.levels_lines(levels or {}),
                *tables.suggestion_lines(suggestions, settings),
                "",
            ]
            _say("\n".join(said))
        past.previous = dict(metrics)
        suggested = self.folder.write("suggested_skips.yaml", lambda: suggestions_yaml(suggestions, settings, plan.suggestions))
        if self.folder.on_disk and not os.path.exists(self.folder.path / "resolved_recipe.yaml"):  # somebody removed it
            self.folder.write("resolved_recipe.yaml", lambda: resolved_yaml(plan))
        if self.folder.on_disk:
            with self.folder.unharmed(self.folder.path / "sensitivity.csv"):
                self._csv.write(epoch, report, plan)
        picture = self.folder.write("heat_map.png", lambda: self._heat_map(suggestions, settings))
        if first:
            past.followed = [entry.name for entry in report.worst_first()[:_FOLLOWED]]
        self.past_metrics.add(epoch, metrics, {})
        self._report.update(
            plan=plan,
            epoch=epoch,
            step=step,
            metrics=dict(metrics),
            original=original,
            calibrated=calibrated or {},
            directions=directions or {},
            extremes=past.extremes,
            metric_epochs=self.past_metrics.epochs,
            qs_epochs=past.epochs,
            loss_epochs=self.past_losses.epochs,
            report=report,
            levels=levels or {},
            views=views or TensorViews(),
            facts=facts or self._report.state.facts,
            suggestions=suggestions,
        )
        with self.folder.unharmed("what goes to the loggers"):
            summary = [*said, "", *plan_lines(plan)]
            both = {name: value for name, value in original.items() if name in metrics}
            self._to_loggers(step, plan, report, levels or {}, summary, suggested, picture, first, both)
        if self.draw:
            self._pictures.draw_plan(plan, qs, self._rises, step, when=f"epoch {epoch}", to_loggers=self._not_shown is None)

    def _to_loggers(
        self,
        step: int,
        plan: QuantizationPlan,
        report: SensitivityReport,
        levels: Mapping[str, LayerLevels],
        summary: Sequence[str],
        suggested: str | None,
        picture: bytes | None,
        first: bool,
        original: Mapping[str, float],
    ) -> None:
        if not self.loggers:
            return
        images = {} if picture is None else {"cco_details/heat_map": picture}
        files = [self.folder.path / name for name in _FILES]
        graph = graph_def(plan, {name: entry.qs for name, entry in report.main.items()}) if first else None
        heavy = Payload(
            step,
            epoch_texts(plan, report, levels, summary, suggested),
            epoch_tables(plan, report, levels),
            images,
            files=files,
            report=self._report.paths,
            graph=graph,
            charts=charts(list(original)),
        )
        self._not_shown = None if worth_showing(self.past.count) else heavy
        light = epoch_values(step, report, levels, self.past.followed, original)
        show(self.loggers, light if self._not_shown is not None else heavy.with_values_of(light))

    def _heat_map(self, suggestions: Sequence[Suggestion], settings: Settings) -> bytes:
        threshold = settings.global_quantization_settings.quantization_sensitivity_threshold
        return _png(heat_map(self.past.epochs, threshold, {suggestion.name for suggestion in suggestions}))

    def on_export(self, report: ExportReport) -> None:
        """Show what an export says of its file."""
        _say(str(report))
        path = report.beside
        with self.folder.unharmed(path):
            report.save(path)
        self._report.update(export=report)
        show(self.loggers, Payload(self._step, {"cco/export": as_code(str(report))}, files=[path], report=self._report.paths))

    def finish(self) -> None:
        """Wait for the pictures, and show the loggers the last ones."""
        self._pictures.finish()
        if self._report.state.epoch is not None:
            self._report.update(finished=True)
            if self._not_shown is None:
                self._not_shown = Payload(self._step, report=self._report.paths)
        if self._not_shown is not None:
            show(self.loggers, self._not_shown)
            self._not_shown = None

    def state_dict(self) -> dict[str, Any]:
        """The history as plain data, a few kilobytes."""
        losses = {"losses": self.past_losses.state_dict(), "loss_table": self._loss_csv.path.name} if self.past_losses.count else {}
        metrics = {"metrics": self.past_metrics.state_dict()}
        return {**self.past.state_dict(), "folder": str(self.folder.path), "table": self._csv.path.name, **metrics, **losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a history."""
        self.past.load_state_dict(state)
        earlier = Path(state.get("folder", self.folder.path)) / str(state.get("table", self._csv.path.name))
        self._csv = SensitivityCsv(self._csv.path, earlier)
        if "metrics" in state:
            self.past_metrics.load_state_dict(state["metrics"])
        if "losses" in state:
            self.past_losses.load_state_dict(state["losses"])
            self._loss_csv = LossSensitivityCsv(self._loss_csv.path, earlier.with_name(str(state["loss_table"])))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _say(text: str) -> None:
    """Into the log; what does not print must not reach a terminal."""
    rank_zero_info("\n".join(printable(line) for line in text.split("\n")))
