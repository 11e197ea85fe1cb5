"""A progress bar for the calibration, of the kind that the Trainer shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar


def with_progress(trainer: pl.Trainer, batches: Iterable[Any], total: int) -> Iterable[Any]:
    """Show a progress bar while calibrating, if the Trainer shows one, and of its kind: a terminal has one live display."""
    if trainer.progress_bar_callback is None or not trainer.is_global_zero:
        return batches
    if isinstance(trainer.progress_bar_callback, RichProgressBar):
        return _with_rich(batches, total)
    from tqdm.auto import tqdm

    bar: Iterable[Any] = tqdm(batches, total=total, desc="Calibrating", leave=False)
    return bar


def _with_rich(batches: Iterable[Any], total: int) -> Iterator[Any]:
    from rich.errors import LiveError
    from rich.progress import Progress

    progress = Progress(transient=True)
    try:
        progress.start()
    except LiveError:  # before Rich 14.1 there is no second display beside the Trainer's
        yield from batches
        return
    try:
        yield from progress.track(batches, total=total, description="Calibrating")
    finally:
        progress.stop()
