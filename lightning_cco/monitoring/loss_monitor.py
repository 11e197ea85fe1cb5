"""Shows the loss sensitivities of a run as it goes, and keeps the history that their heat map needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_cco.loss_sensitivity import LossSensitivityReport
from lightning_cco.monitoring import tables, tags
from lightning_cco.monitoring.history import FOLLOWED, History, worth_showing
from lightning_cco.monitoring.loggers import Payload, show
from lightning_cco.monitoring.loss_view import LossSensitivityCsv, loss_header, loss_heat_map, loss_rows, loss_table
from lightning_cco.monitoring.run_folder import RunFolder
from lightning_cco.monitoring.run_log import say
from lightning_cco.quantization.plan import QuantizationPlan


class LossMonitor:
    """Writes ``loss_sensitivity.csv`` and ``loss_heat_map.png``.

    Args:
        folder: Where files go.
        loggers: The Trainer's loggers.

    Attributes:
        past: Expected rise of the loss by epoch and layer.
        rises: That of the last epoch.
    """

    def __init__(self, folder: RunFolder, loggers: Sequence[Any]) -> None:
        self.folder, self.loggers = folder, loggers
        self.past = History()
        self.rises: dict[str, float] = {}
        self._csv = LossSensitivityCsv(folder.path / "loss_sensitivity.csv")

    def show(self, epoch: int, step: int, plan: QuantizationPlan, losses: LossSensitivityReport, threshold: float | None) -> None:
        """Show the loss sensitivities of an epoch.

        Args:
            epoch: Its number, from 0.
            step: Global step.
            plan: What was quantized.
            losses: What was measured.
            threshold: From which rise on a layer is suggested to be skipped.
        """
        rises = self.rises = losses.rises(plan)
        self.past.add(epoch, rises, {})
        with self.folder.unharmed("the loss sensitivities"):
            say(loss_table(losses, plan))
        if self.folder.on_disk:
            with self.folder.unharmed(self._csv.path):
                self._csv.write_losses(epoch, losses, plan)
        paths = plan.graph.paths
        picture = self.folder.write_picture("loss_heat_map.png", lambda: loss_heat_map(self.past, threshold, (), paths))
        with self.folder.unharmed("what goes to the loggers"):
            rows = loss_rows(losses, plan)
            light = {tags.of_layer("loss", name): rise for name, rise in list(rises.items())[:FOLLOWED]}
            if not worth_showing(self.past.count):
                show(self.loggers, Payload(step, scalars=light))
                return
            text = tables.markdown_table(loss_header(losses), rows[: tables.MOST_ROWS], of=len(rows))
            images = {} if picture is None else {tags.detail("loss_heat_map"): picture}
            files = [self._csv.path, self.folder.path / "loss_heat_map.png"]
            show(self.loggers, Payload(step, texts={tags.detail("loss_sensitivity"): text}, images=images, files=files, scalars=light))

    def state_dict(self) -> dict[str, Any]:
        """The history as plain data; empty where nothing was shown."""
        return {"losses": self.past.state_dict(), "loss_table": self._csv.path.name} if self.past.count else {}

    def load_state_dict(self, state: Mapping[str, Any], folder: Path) -> None:
        """Go on from a history.

        Args:
            state: The monitor's state.
            folder: Where the run before has written.
        """
        if "losses" in state:
            self.past.load_state_dict(state["losses"])
            self._csv = LossSensitivityCsv(self._csv.path, folder / str(state["loss_table"]))
