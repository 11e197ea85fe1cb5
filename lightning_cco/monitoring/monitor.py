"""Shows a compression as it goes: the log, files, loggers. It keeps the history that heat map and tables need.

Nothing here ends a training: what can't be drawn, written or shown is one warning, and on it goes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_cco.budget.plan import BudgetPlan
from lightning_cco.export.report import ExportReport
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.loss_sensitivity import LossSensitivityReport
from lightning_cco.monitoring import tables, tags
from lightning_cco.monitoring.budget_view import show_budget
from lightning_cco.monitoring.epoch import EpochResults
from lightning_cco.monitoring.epoch_view import as_code, charts, epoch_tables, epoch_texts, epoch_values
from lightning_cco.monitoring.graph_def import graph_def
from lightning_cco.monitoring.heat_map import heat_map
from lightning_cco.monitoring.history import FOLLOWED, History, worth_showing
from lightning_cco.monitoring.loggers import Payload, show
from lightning_cco.monitoring.loss_monitor import LossMonitor
from lightning_cco.monitoring.pictures import Pictures
from lightning_cco.monitoring.plan_log import layers_text, plan_lines, start_lines
from lightning_cco.monitoring.report_files import ReportFiles
from lightning_cco.monitoring.resolved import resolved_yaml
from lightning_cco.monitoring.run_folder import RunFolder
from lightning_cco.monitoring.run_log import say
from lightning_cco.monitoring.sensitivity_csv import SensitivityCsv
from lightning_cco.names import printable
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.report_page.facts import ModelFacts
from lightning_cco.settings import Settings
from lightning_cco.suggestions import suggestions_yaml

_FILES = ("suggested_skips.yaml", "sensitivity.csv", "heat_map.png", "resolved_recipe.yaml", "layers.txt")


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
        self.past_metrics = History()
        self.losses = LossMonitor(self.folder, self.loggers)
        self._csv = SensitivityCsv(self.folder.path / "sensitivity.csv")
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
            say("\n".join(start_lines(graph, plan)))
        self._report.state.facts = facts or ModelFacts()
        self._write_plan(plan)
        if self.draw:
            self._pictures.draw_graph(graph)
            self._pictures.draw_plan(plan, {}, {}, step=0, when="before training", to_loggers=True)
        say(f"Pictures, recipes and the report page (report.html): {printable(self.folder.path)}")

    def on_plan(self, plan: QuantizationPlan) -> None:
        """Say what a plan does, and write it as a recipe that can be fed back."""
        if not self.enabled:
            return
        with self.folder.unharmed("the plan"):
            say("\n".join(plan_lines(plan)))
        self._write_plan(plan)

    def _write_plan(self, plan: QuantizationPlan, budget: BudgetPlan | None = None) -> None:
        self.folder.write("resolved_recipe.yaml", lambda: resolved_yaml(plan, budget))
        self.folder.write("layers.txt", lambda: layers_text(plan))
        self._report.update(plan=plan)

    def on_budget(self, budget: BudgetPlan, step: int) -> None:
        """Show what a budget has chosen, and write the plan's recipe with it."""
        if not self.enabled:
            return
        if self._report.state.plan is not None:
            self._write_plan(self._report.state.plan, budget)
        self._report.update(budget=budget)
        show_budget(budget, step, self.folder, self.loggers)

    def on_losses(self, epoch: int, step: int, plan: QuantizationPlan, losses: LossSensitivityReport, settings: Settings) -> None:
        """Show the loss sensitivities of an epoch; before `on_epoch`, whose picture has them too."""
        if not self.enabled:
            return
        self._report.state.losses = losses
        self.losses.show(epoch, step, plan, losses, settings.global_quantization_settings.loss_sensitivity_threshold)

    def on_float_epoch(self, epoch: int, metrics: Mapping[str, float], original: Mapping[str, float]) -> None:
        """Show the metrics of an epoch before fake-quantization has started; the best ones are those of the compressed model alone."""
        if not self.enabled:
            return
        with self.folder.unharmed("the epoch's summary"):
            before = {name: f" (original {original[name]:.4g})" for name in metrics if name in original}
            said = [f"  {name}: {value:.4g}{before.get(name, '')}" for name, value in metrics.items()]
            say("\n".join([f"Summary of epoch {epoch}, trained in float", *said]))

    def on_epoch(self, results: EpochResults) -> None:
        """Show an epoch that was measured."""
        if not self.enabled:
            return
        self._step = results.step
        past, first, plan, metrics = self.past, self.past.count == 0, results.plan, results.metrics
        past.add(results.epoch, {name: results.qs[name] for name in plan.graph.names if name in results.qs}, metrics.values)
        self._say_summary(results)
        past.previous = dict(metrics.values)
        suggested = self._write_epoch(results)
        picture = self.folder.write_picture("heat_map.png", lambda: self._heat_map(results))
        if first:
            past.followed = [entry.name for entry in results.report.worst_first()[:FOLLOWED]]
        self.past_metrics.add(results.epoch, metrics.values, {})
        self._update_report(results)
        with self.folder.unharmed("what goes to the loggers"):
            self._to_loggers(results, suggested, picture, first)
        if self.draw:
            self._pictures.draw_plan(
                plan, results.qs, self.losses.rises, results.step, when=f"epoch {results.epoch}", to_loggers=self._not_shown is None
            )

    def _say_summary(self, results: EpochResults) -> None:
        metrics, said = results.metrics, [f"Summary of epoch {results.epoch}"]
        with self.folder.unharmed("the epoch's summary"):
            if metrics.values:
                said.append(tables.metrics_table(metrics, self.past.previous, self.past.extremes))
            said += [
                "",
                tables.sensitivity_table(results.report, results.plan),
                *tables.levels_lines(results.levels),
                *tables.suggestion_lines(results.suggestions, results.settings),
                "",
            ]
            say("\n".join(said))

    def _write_epoch(self, results: EpochResults) -> str | None:
        """Write recipes and the table of sensitivities; the recipe with the suggestions is returned."""
        plan, suggestions = results.plan, results.suggestions
        suggested = self.folder.write("suggested_skips.yaml", lambda: suggestions_yaml(suggestions, results.settings, plan.suggestions))
        if self.folder.on_disk:
            if not os.path.exists(self.folder.path / "resolved_recipe.yaml"):  # somebody removed it
                self.folder.write("resolved_recipe.yaml", lambda: resolved_yaml(plan))
            with self.folder.unharmed(self.folder.path / "sensitivity.csv"):
                self._csv.write(results.epoch, results.report, plan)
        return suggested

    def _update_report(self, results: EpochResults) -> None:
        metrics = results.metrics
        self._report.update(
            plan=results.plan,
            epoch=results.epoch,
            step=results.step,
            metrics=dict(metrics.values),
            original=metrics.original,
            calibrated=metrics.calibrated,
            directions=metrics.directions,
            extremes=self.past.extremes,
            metric_epochs=self.past_metrics.epochs,
            qs_epochs=self.past.epochs,
            loss_epochs=self.losses.past.epochs,
            report=results.report,
            levels=results.levels,
            views=results.views,
            facts=results.facts or self._report.state.facts,
            suggestions=results.suggestions,
        )

    def _to_loggers(self, results: EpochResults, suggested: str | None, picture: bytes | None, first: bool) -> None:
        if not self.loggers:
            return
        heavy = Payload(
            results.step,
            epoch_texts(results, self.past.extremes, suggested),
            epoch_tables(results),
            {} if picture is None else {tags.detail("heat_map"): picture},
            files=[self.folder.path / name for name in _FILES],
            report=self._report.paths,
            graph=graph_def(results.plan, results.qs) if first else None,
            charts=charts(list(results.metrics.in_both)),
        )
        self._not_shown = None if worth_showing(self.past.count) else heavy
        light = epoch_values(results, self.past.followed)
        show(self.loggers, light if self._not_shown is not None else heavy.with_values_of(light))

    def _heat_map(self, results: EpochResults) -> Image.Image:
        threshold = results.settings.global_quantization_settings.quantization_sensitivity_threshold
        suggested = {suggestion.name for suggestion in results.suggestions}
        return heat_map(self.past.epochs, threshold, suggested, paths=results.plan.graph.paths)

    def on_export(self, report: ExportReport) -> None:
        """Show what an export says of its file."""
        say(str(report))
        path = report.beside
        with self.folder.unharmed(path):
            report.save(path)
        self._report.update(export=report)
        show(self.loggers, Payload(self._step, {tags.EXPORT: as_code(str(report))}, files=[path], report=self._report.paths))

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
        written = {"folder": str(self.folder.path), "table": self._csv.path.name}
        return {**self.past.state_dict(), **written, "metrics": self.past_metrics.state_dict(), **self.losses.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a history."""
        self.past.load_state_dict(state)
        folder = Path(state.get("folder", self.folder.path))
        self._csv = SensitivityCsv(self._csv.path, folder / str(state.get("table", self._csv.path.name)))
        if "metrics" in state:
            self.past_metrics.load_state_dict(state["metrics"])
        self.losses.load_state_dict(state, folder)
