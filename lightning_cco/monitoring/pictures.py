"""Pictures of a run, drawn in the background: the layout of a large net takes seconds, and the training need not wait for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning_cco.drawing.render import save_overview, save_pictures
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.monitoring import tags
from lightning_cco.monitoring.loggers import Payload, show
from lightning_cco.monitoring.run_folder import RunFolder
from lightning_cco.quantization.plan import QuantizationPlan


class Pictures:
    """Draws into a folder, and shows the loggers what it has drawn.

    Args:
        folder: Where the pictures go.
        loggers: The Trainer's loggers.
    """

    def __init__(self, folder: RunFolder, loggers: Sequence[Any]) -> None:
        self.folder, self.loggers = folder, loggers
        self._drawing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cco-draw")
        self._pending: list[Future[None]] = []

    def draw_graph(self, graph: LayerGraph) -> None:
        """``model_init``: the layers as captured."""

        def draw() -> None:
            self._show(tags.detail("model_init"), save_pictures(graph, self.folder.path / "model_init", title="model_init"), 0)

        self._in_background(draw)

    def draw_plan(
        self, plan: QuantizationPlan, qs: Mapping[str, float], rises: Mapping[str, float], step: int, when: str, to_loggers: bool
    ) -> None:
        """``overview`` and ``model_post_preprocessing``.

        Args:
            plan: What is quantized.
            qs: Quantization Sensitivity by layer.
            rises: Expected rise of the loss by layer.
            step: Global step.
            when: Words for it, for the titles.
            to_loggers: Whether the loggers are shown the pictures.
        """

        def draw() -> None:
            overview = save_overview(plan.graph, self.folder.path / "overview", plan, qs, f"overview, {when}")
            if to_loggers:
                self._show(tags.OVERVIEW, overview, step)
            stem = self.folder.path / "model_post_preprocessing"
            written = save_pictures(plan.graph, stem, plan, qs, f"model_post_preprocessing, {when}", rises)
            if to_loggers:
                self._show(tags.detail("graph"), written, step)

        self._in_background(draw)

    def finish(self) -> None:
        """Wait for what is being drawn."""
        for future in self._pending:
            if not future.cancelled():
                future.result()
        self._pending.clear()

    def _show(self, tag: str, written: Mapping[str, Path], step: int) -> None:
        if self.loggers and "png" in written:
            files = [written[ending] for ending in ("svg", "png") if ending in written]
            show(self.loggers, Payload(step, images={tag: written["png"].read_bytes()}, files=files))

    def _in_background(self, job: Callable[[], None]) -> None:
        def work() -> None:
            with self.folder.unharmed("the picture of the layer graph"):
                job()

        if not self.folder.on_disk:
            return
        # Pictures of an epoch that has passed are not worth a queue.
        self._pending = [future for future in self._pending if not future.done() and not future.cancel()]
        with self.folder.unharmed("the picture of the layer graph"):
            self._pending.append(self._drawing.submit(work))
