"""Hands pictures, tables and histograms to the loggers that can show them. A logger that fails never ends a training."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
from PIL import Image

from lightning_cco.compat.tensorboard import write_graph, write_scalars
from lightning_cco.errors import CCOWarning


@dataclass
class Payload:
    """What an epoch has to show.

    Attributes:
        step: Global step.
        texts: Markdown by tag.
        tables: Header and rows by tag, for loggers that show tables as such.
        images: PNG files by tag.
        histograms: Values by tag.
        scalars: Single values by tag, for loggers that take many at once.
        files: Paths of files for loggers that take artifacts.
        report: Those of the report page, which is one artifact also where the other files are not.
        graph: A serialized GraphDef for TensorBoard's Graphs page.
        original: Metrics of the float model, to be shown with those of the compressed one.
        charts: Which curves belong into one chart, by chart and by group.
    """

    step: int
    texts: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = field(default_factory=dict)
    images: Mapping[str, bytes] = field(default_factory=dict)
    histograms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    files: Sequence[Path] = ()
    report: Sequence[Path] = ()
    graph: bytes | None = None
    original: Mapping[str, float] = field(default_factory=dict)
    charts: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)

    def with_values_of(self, other: Payload) -> Payload:
        """This one with another's histograms, scalars and metrics of the float model."""
        return replace(self, histograms=other.histograms, scalars=other.scalars, original=other.original)


def show(loggers: Sequence[Any], payload: Payload) -> None:
    """Give each logger what it can show. TensorBoard all; WandB images, tables, histograms, curves and the report; MLflow the files; others nothing here.

    Loggers derived from these are treated as these.
    """
    for logger in loggers:
        give = next((_GIVERS[kind.__name__] for kind in type(logger).__mro__ if kind.__name__ in _GIVERS), None)
        if give is None:
            continue
        try:
            give(logger, payload)
        except Exception as error:
            kind = (type(logger).__name__, type(error).__name__)
            if kind not in _WARNED.setdefault(logger, set()):
                _WARNED[logger].add(kind)
                warnings.warn(
                    f"lightning_cco: {type(logger).__name__} could not show pictures and tables: {type(error).__name__}: {error}",
                    CCOWarning,
                    stacklevel=2,
                )


def _tensorboard(logger: Any, payload: Payload) -> None:
    writer = logger.experiment
    for tag, text in payload.texts.items():
        writer.add_text(tag, text, payload.step)
    for tag, png in payload.images.items():
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        writer.add_image(tag, pixels, payload.step, dataformats="HWC")
    for tag, values in payload.histograms.items():
        finite = _finite(values)
        if finite.size:
            writer.add_histogram(tag, finite, payload.step)
    if payload.scalars:
        write_scalars(writer, payload.scalars, payload.step)
    if payload.graph is not None:
        write_graph(writer, payload.graph)
    if payload.charts and logger not in _CHARTED:
        writer.add_custom_scalars(payload.charts)
        _CHARTED.add(logger)
    if payload.original:
        _beside(logger, writer, payload)
    writer.flush()


def _beside(logger: Any, writer: Any, payload: Payload) -> None:
    """Draw the metrics of the float model as level lines, of a run of their own: TensorBoard shows curves of one name in one chart."""
    lines = _ORIGINALS.get(logger)
    if lines is None:
        lines = _ORIGINALS[logger] = type(writer)(log_dir=os.path.join(logger.log_dir, "float"))
        write_scalars(lines, payload.original, 0)
    write_scalars(lines, payload.original, payload.step)
    lines.flush()


def _wandb(logger: Any, payload: Payload) -> None:
    for tag, png in payload.images.items():
        logger.log_image(key=tag, images=[Image.open(io.BytesIO(png))], step=payload.step)
    for tag, (header, rows) in payload.tables.items():
        logger.log_table(key=tag, columns=list(header), data=[list(row) for row in rows], step=payload.step)
    for tag, text in payload.texts.items():
        if tag not in payload.tables:
            logger.log_text(key=tag, columns=["text"], data=[[text]], step=payload.step)
    metrics: dict[str, Any] = {**payload.scalars, **{f"float/{name}": value for name, value in payload.original.items()}}
    if payload.histograms:
        import wandb

        metrics |= {tag: wandb.Histogram(_finite(values)) for tag, values in payload.histograms.items()}
    if metrics:
        logger.log_metrics(metrics, step=payload.step)
    written = [path for path in payload.report if path.exists()]
    run, kind = getattr(logger, "experiment", None), getattr(sys.modules.get("wandb"), "Artifact", None)
    if written and run is not None and kind is not None:
        artifact = kind(f"cco-report-{run.id}", type="cco-report")
        for path in written:
            artifact.add_file(str(path))
        run.log_artifact(artifact)


def _mlflow(logger: Any, payload: Payload) -> None:
    for path in [*payload.files, *payload.report]:
        if path.exists():
            logger.experiment.log_artifact(logger.run_id, str(path), artifact_path="cco")


def _finite(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]


_WARNED: WeakKeyDictionary[Any, set[tuple[str, str]]] = WeakKeyDictionary()  # by logger, of which kinds of error it is known

_ORIGINALS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # by logger, what writes the curves of the float model

_CHARTED: WeakSet[Any] = WeakSet()  # loggers that know which curves belong into one chart

_GIVERS: dict[str, Callable[[Any, Payload], None]] = {
    "TensorBoardLogger": _tensorboard,
    "WandbLogger": _wandb,
    "MLFlowLogger": _mlflow,
}
