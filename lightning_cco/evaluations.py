"""Validations, tests and predictions of a run: ranges are frozen in them, and in them alone; it is said where another network runs in one."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl

from lightning_cco.compression import Compression
from lightning_cco.distillation.distiller import Distiller
from lightning_cco.errors import CCOWarning
from lightning_cco.graph.call_node import CallNode
from lightning_cco.quantized_model import QuantizedModel

_NOUNS = {"validating": "validation", "sanity_checking": "validation", "testing": "test", "predicting": "prediction"}


class Evaluations:
    """What is done around each evaluation.

    Args:
        compression: The module of the run.
        distiller: What compares nothing meanwhile.
    """

    def __init__(self, compression: Compression, distiller: Distiller) -> None:
        self._compression, self._distiller = compression, distiller
        self._warned = False

    def begin(self) -> None:
        """An evaluation begins: ranges are frozen in it, also where it records gradients (forces)."""
        quantized = self._compression.quantized
        if quantized is not None:
            quantized.follow_ranges(False)
            quantized.runtime.frames.forget_what_ran()
        self._distiller.pause()

    def end(self, trainer: pl.Trainer) -> None:
        """An evaluation has ended: ranges follow again, whoever trains the model next. Say once if the compressed model had no part in it."""
        quantized = self._compression.quantized
        if quantized is None:
            return
        quantized.follow_ranges(True)
        if self._warned or not quantized.calibrated or _has_run(quantized):
            return
        self._warned = True
        noun = _NOUNS.get(str(getattr(trainer.state.stage, "name", "")).lower(), "evaluation")
        warnings.warn(
            f"trainer.{getattr(trainer.state.fn, 'value', '')}: the {noun} called none of the layers that are quantized, so what it gives is not that of the "
            "compressed model: it runs no network, or another one, in float, such as a copy with averaged weights (EMA), a copy.deepcopy or an exported file. "
            "Call the module's own layers. For averaged weights use the callback EMAWeightAveraging or WeightAveraging of Lightning: it puts them "
            "into the module.",
            CCOWarning,
            stacklevel=3,
        )

    def interrupted(self) -> None:
        """An evaluation may have ended by an exception."""
        if self._compression.quantized is not None:
            self._compression.quantized.follow_ranges(True)


def _has_run(quantized: QuantizedModel) -> bool:
    """Whether a module in which something is rounded has run, or a compiled graph of the model; true where nothing is rounded."""
    frames = quantized.runtime.frames
    rounding = [node for node in frames.root.walk() if _rounds(node)]
    return frames.graph_ran or not rounding or any(node.ran for node in rounding)


def _rounds(node: CallNode) -> bool:
    return any(entry.sites for table in node.tables.values() for entry in table.values())
