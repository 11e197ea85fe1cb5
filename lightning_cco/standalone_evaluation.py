"""Validations, tests and predictions outside of a training: whether the weights that run have ranges."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
from torch import nn

from lightning_cco.errors import CCOWarning


class OutsideFit:
    """Follows which weights a run has, and whether ranges came with them."""

    def __init__(self) -> None:
        self._weights_are_known = self._ranges_came = True
        self._warned_of_float = False

    def begin(self, stage: str, quantized_model: nn.Module | None, module: nn.Module) -> None:
        """A run begins.

        Args:
            stage: Lightning's name of it.
            quantized_model: The model that is quantized already, if one is.
            module: The model of the run.
        """
        self._ranges_came = stage == "fit"
        self._weights_are_known = stage == "fit" or quantized_model is None or quantized_model is module

    def loaded(self) -> None:
        """A checkpoint with ranges was loaded."""
        self._weights_are_known = self._ranges_came = True

    def without_ranges(self, trainer: pl.Trainer) -> str:
        """Where weights came from that have no ranges of their own, in words; empty if they have. From then on they count as known."""
        if self._weights_are_known and (not trainer.ckpt_path or self._ranges_came):
            return ""
        self.loaded()
        return (
            f"{trainer.ckpt_path} holds no ranges (save_weights_only=True)"
            if trainer.ckpt_path
            else "the model is another than the one trained"
        )

    def warn_of_float(self, trainer: pl.Trainer, why: str = "") -> None:
        """Say once that the model runs in float, and why, if that is known."""
        if self._warned_of_float:
            return
        self._warned_of_float = True
        if why:
            warnings.warn(f"trainer.{getattr(trainer.state.fn, 'value', '')}: the model runs in float: {why}.", CCOWarning, stacklevel=3)
            return
        warnings.warn(
            f"trainer.{getattr(trainer.state.fn, 'value', '')}: the model runs in float: CCOCallback has no ranges, since no checkpoint with its "
            "state was loaded (ModelCheckpoint(save_weights_only=True) and runs without the callback save none). For the compressed model "
            "give a whole checkpoint as ckpt_path, or run trainer.fit first, with this callback; to evaluate the float model, leave it out.",
            CCOWarning,
            stacklevel=3,
        )
