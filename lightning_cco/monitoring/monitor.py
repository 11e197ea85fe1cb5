"""Shows a compression as it goes: the log, files, loggers. It keeps the history that heat map and tables need."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_cco.errors import CCOError
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.render import save_pictures
from lightning_cco.monitoring import tables
from lightning_cco.monitoring.graph_def import graph_def
from lightning_cco.monitoring.heat_map import heat_map
from lightning_cco.monitoring.loggers import Payload, show
from lightning_cco.monitoring.resolved import resolved_yaml
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.sensitivity import SensitivityReport
from lightning_cco.settings import Settings
from lightning_cco.suggestions import Suggestion, suggestions_yaml

if TYPE_CHECKING:
    from lightning_cco.export import ExportReport


_FOLLOWED = 30  # layers with a curve of their own: as many as a page can show


class Monitor:
    """Writes what a user sees of one run.

    Files in ``folder``: ``model_init.{svg,png,dot}``, ``model_post_preprocessing.{svg,png,dot}`` (redrawn each epoch), ``resolved_recipe.yaml``,
    ``suggested_skips.yaml``, ``sensitivity.csv``, ``heat_map.png``.

    Args:
        folder: Where files go; made if missing.
        loggers: The Trainer's loggers.
        enabled: Whether this process writes (rank 0).
        draw: Whether to draw the layer graph.
    """

    def __init__(self, folder: Path, loggers: Sequence[Any] = (), enabled: bool = True, draw: bool = True) -> None:
        self.folder, self.loggers, self.enabled, self.draw = Path(folder), list(loggers), enabled, draw
        self.history: list[tuple[int, dict[str, float]]] = []
        self.extremes: dict[str, dict[str, float]] = {}
        self.previous: dict[str, float] = {}
        self.followed: list[str] = []
        self._rows: list[list[str]] = []
        self._step = 0
        self._drawing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cco-draw")
        self._pending: list[Future[None]] = []

    def on_start(self, graph: LayerGraph, plan: QuantizationPlan) -> None:
        """Say what was captured and planned, draw it, write the resolved recipe.

        Raises:
            CCOError: The folder can't be written.
        """
        if not self.enabled:
            return
        self._make_folder()
        rank_zero_info(f"Parsed layers:\n{tables.parsed_layers(graph)}")
        self.on_plan(plan)
        if self.draw:
            self._draw_init(graph)
            self._draw_plan(plan, {}, step=0, when="before training")
        rank_zero_info(f"Pictures and recipes: {self.folder}")

    def on_plan(self, plan: QuantizationPlan) -> None:
        """Say what a plan does, and write it as a recipe that can be fed back."""
        if not self.enabled:
            return
        rank_zero_info("\n".join(tables.plan_lines(plan)))
        self._write("resolved_recipe.yaml", lambda path: path.write_text(resolved_yaml(plan), encoding="utf-8"))

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
        """
        if not self.enabled:
            return
        self._step = step
        qs = {name: entry.qs for name, entry in report.main.items()}
        ordered = {name: qs[name] for name in plan.graph.names if name in qs}
        self.history = [entry for entry in self.history if entry[0] != epoch] + [(epoch, ordered)]
        self._remember(epoch, metrics)
        said = [f"Summary of epoch {epoch}"]
        if metrics:
            said.append(tables.metrics_table(metrics, original, self.previous, self.extremes, directions or {}))
        said += ["", tables.sensitivity_table(report, plan), *tables.suggestion_lines(suggestions, settings), ""]
        rank_zero_info("\n".join(said))
        self.previous = dict(metrics)
        suggested = suggestions_yaml(suggestions, settings, plan.suggestions)
        self._write("suggested_skips.yaml", lambda path: path.write_text(suggested, encoding="utf-8"))
        self._write_csv(epoch, report, plan)
        picture = self._draw_heat_map(suggestions, settings)
        rows = tables.sensitivity_rows(report, plan)
        first = len(self.history) == 1
        if first:
            self.followed = [entry.name for entry in report.worst_first()[:_FOLLOWED]]
        payload = Payload(
            step,
            texts={
                "cco/sensitivity": tables.markdown_table(tables.SENSITIVITY_HEADER, rows),
                "cco/suggestions": "\n".join(f"    {line}" for line in suggested.splitlines()),
            },
            tables={"cco/sensitivity": (tables.SENSITIVITY_HEADER, rows)},
            images={"cco/heat_map": picture},
            histograms={"cco/qs": list(qs.values())},
            scalars={f"cco_qs/{name}": qs[name] for name in self.followed if name in qs},
            files=[self.folder / name for name in ("suggested_skips.yaml", "sensitivity.csv", "heat_map.png", "resolved_recipe.yaml")],
            graph=graph_def(plan, qs) if first else None,
        )
        show(self.loggers, payload)
        if self.draw:
            self._draw_plan(plan, qs, step, when=f"epoch {epoch}")

    def _draw_heat_map(self, suggestions: Sequence[Suggestion], settings: Settings) -> bytes:
        threshold = settings.global_quantization_settings.quantization_sensitivity_threshold
        buffer = io.BytesIO()
        heat_map(self.history, threshold, {suggestion.name for suggestion in suggestions}).save(buffer, format="PNG")
        self._write("heat_map.png", lambda path: path.write_bytes(buffer.getvalue()))
        return buffer.getvalue()

    def on_export(self, report: ExportReport) -> None:
        """Show what an export says of its file."""
        rank_zero_info(str(report))
        path = Path(report.path).with_name("export_report.json")
        report.save(path)
        text = "\n".join(f"    {line}" for line in str(report).splitlines())
        show(self.loggers, Payload(self._step, {"cco/export": text}, files=[path]))

    def _draw_init(self, graph: LayerGraph) -> None:
        def draw() -> None:
            self._show_picture("cco/model_init", save_pictures(graph, self.folder / "model_init", title="model_init"), step=0)

        self._in_background(draw)

    def _show_picture(self, tag: str, written: Mapping[str, Path], step: int) -> None:
        if self.loggers and "png" in written:
            files = [written[ending] for ending in ("svg", "png") if ending in written]
            show(self.loggers, Payload(step, images={tag: written["png"].read_bytes()}, files=files))

    def _draw_plan(self, plan: QuantizationPlan, qs: Mapping[str, float], step: int, when: str) -> None:
        """Draw in the background: the layout of a large net takes seconds, the training need not wait for it."""

        def draw() -> None:
            stem = self.folder / "model_post_preprocessing"
            self._show_picture("cco/graph", save_pictures(plan.graph, stem, plan, qs, f"model_post_preprocessing, {when}"), step)

        self._in_background(draw)

    def _in_background(self, job: Callable[[], Any]) -> None:
        # Pictures of an epoch that has passed are not worth a queue.
        self._pending = [future for future in self._pending if not future.done() and not future.cancel()]
        self._pending.append(self._drawing.submit(lambda: (job(), None)[1]))

    def finish(self) -> None:
        """Wait for the pictures."""
        for future in self._pending:
            if not future.cancelled():
                future.result()
        self._pending.clear()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise CCOError(
                f"The folder '{self.folder}' for pictures and recipes can't be written: {error}. "
                "Set monitoring_settings.output_dir to one that can, or the Trainer's default_root_dir."
            ) from error

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        """Write a file whole or not at all."""
        path = self.folder / name
        temporary = path.with_name(f".{name}")
        write(temporary)
        temporary.replace(path)

    def _write_csv(self, epoch: int, report: SensitivityReport, plan: QuantizationPlan) -> None:
        self._rows = [row for row in self._rows if row[0] != str(epoch)]
        for name in plan.graph.names:
            local, accumulated = report.local.get(name), report.accumulated.get(name)
            if local is None and accumulated is None:
                continue
            cells = [str(epoch), name, plan.graph[name].path]
            for entry in (local, accumulated):
                cells += [f"{entry.qs:.9g}", f"{entry.relative:.9g}", f"{entry.sqnr_db:.6g}"] if entry else ["", "", ""]
            self._rows.append(cells)
        header = ["epoch", "layer", "module", "qs", "relative", "sqnr_db", "accumulated_qs", "accumulated_relative", "accumulated_sqnr_db"]

        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([header, *self._rows])

        self._write("sensitivity.csv", write)

    def _remember(self, epoch: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            best = self.extremes.setdefault(name, {"lowest": value, "lowest_epoch": epoch, "highest": value, "highest_epoch": epoch})
            if value < best["lowest"]:
                best["lowest"], best["lowest_epoch"] = value, epoch
            if value > best["highest"]:
                best["highest"], best["highest_epoch"] = value, epoch

    def state_dict(self) -> dict[str, Any]:
        """The history as plain data."""
        history = [{"epoch": epoch, "qs": dict(values)} for epoch, values in self.history]
        return {
            "history": history,
            "extremes": {name: dict(best) for name, best in self.extremes.items()},
            "previous": dict(self.previous),
            "followed": list(self.followed),
            "rows": [list(row) for row in self._rows],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a history."""
        self.history = [(entry["epoch"], dict(entry["qs"])) for entry in state["history"]]
        self.extremes = {name: dict(best) for name, best in state["extremes"].items()}
        self.previous = dict(state["previous"])
        self.followed = list(state["followed"])
        self._rows = [list(row) for row in state["rows"]]
