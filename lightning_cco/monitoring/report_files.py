"""The files of the report page in a run's folder, written anew whenever more is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_cco.monitoring.run_folder import RunFolder
from lightning_cco.report_page.data import RunState, report_data, to_json
from lightning_cco.report_page.model_explorer import model_explorer_figures, model_explorer_graph
from lightning_cco.report_page.page import page

REPORT, PAGE = "report.json", "report.html"


class ReportFiles:
    """Writes ``report.html``, the ``report.json`` that it is made of, and the same graph for Model Explorer.

    Args:
        folder: The run's folder.

    Attributes:
        state: What is known of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.state = folder, RunState()
        self._written: list[Path] = []

    @property
    def paths(self) -> list[Path]:
        """The files that were written, for loggers that take them."""
        return list(self._written)

    def update(self, **known: Any) -> None:
        """Take over what is known now, and write the files. An error is a warning.

        Args:
            **known: Attributes of the `RunState`.
        """
        data: dict[str, Any] | None = None
        with self.folder.unharmed("the report page"):
            for name, value in known.items():
                setattr(self.state, name, value)
            if self.state.plan is not None:
                data = report_data(self.state)
        if data is None:
            return
        told = data
        self.folder.write(REPORT, lambda: to_json(told))
        self.folder.write(PAGE, lambda: page(told))
        self.folder.write("model_explorer.json", lambda: to_json(model_explorer_graph(told)))
        self.folder.write("model_explorer_data.json", lambda: to_json(model_explorer_figures(told)))
        if self.folder.on_disk:
            self._written = [self.folder.path / name for name in (REPORT, PAGE, "model_explorer.json", "model_explorer_data.json")]
