"""Hands pictures, tables and histograms to the loggers that can show them. A logger that fails never ends a training."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightning_cco.errors import CCOWarning


@dataclass
class Payload:
    """What an epoch has to show.

    Attributes:
        step: Global step.
        texts: Markdown by tag.
        images: PNG files by tag.
        histograms: Values by tag.
        files: Paths of files for loggers that take artifacts.
        graph: A serialized GraphDef for TensorBoard's Graphs page.
    """

    step: int
    texts: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, bytes] = field(default_factory=dict)
    histograms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    files: Sequence[Path] = ()
    graph: bytes | None = None


def show(loggers: Sequence[Any], payload: Payload) -> None:
    """Give each logger what it can show. TensorBoard everything; WandB images and tables; MLflow the files; others nothing here."""
    for logger in loggers:
        give = _GIVERS.get(type(logger).__name__)
        if give is None:
            continue
        try:
            give(logger, payload)
        except Exception as error:
            warnings.warn(f"lightning_cco: {type(logger).__name__} could not show pictures and tables: {error}", CCOWarning, stacklevel=2)


def _tensorboard(logger: Any, payload: Payload) -> None:
    writer = logger.experiment
    for tag, text in payload.texts.items():
        writer.add_text(tag, text, payload.step)
    for tag, png in payload.images.items():
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        writer.add_image(tag, pixels, payload.step, dataformats="HWC")
    for tag, values in payload.histograms.items():
        finite = np.asarray(values, dtype=np.float64)
        finite = finite[np.isfinite(finite)]
        if finite.size:
            writer.add_histogram(tag, finite, payload.step)
    if payload.graph is not None:
        from tensorboard.compat.proto.event_pb2 import Event

        writer._get_file_writer().add_event(Event(graph_def=payload.graph))
    writer.flush()


def _wandb(logger: Any, payload: Payload) -> None:
    for tag, png in payload.images.items():
        logger.log_image(key=tag, images=[Image.open(io.BytesIO(png))], step=payload.step)
    for tag, text in payload.texts.items():
        logger.log_text(key=tag, columns=["markdown"], data=[[text]], step=payload.step)


def _mlflow(logger: Any, payload: Payload) -> None:
    for path in payload.files:
        if path.exists():
            logger.experiment.log_artifact(logger.run_id, str(path), artifact_path="cco")


_GIVERS: dict[str, Callable[[Any, Payload], None]] = {
    "TensorBoardLogger": _tensorboard,
    "WandbLogger": _wandb,
    "MLFlowLogger": _mlflow,
}
