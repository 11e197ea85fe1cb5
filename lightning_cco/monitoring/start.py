"""The monitor of a run: its folder, its loggers, and the history of the run before."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_cco.errors import CCOWarning
from lightning_cco.monitoring.monitor import Monitor
from lightning_cco.settings import MonitoringSettings


def start_monitor(trainer: pl.Trainer, settings: MonitoringSettings, history: Mapping[str, Any] | None) -> Monitor:
    """Make a run's monitor.

    Args:
        trainer: The Trainer.
        settings: Where to write, and whether to draw.
        history: What an earlier monitor's `Monitor.state_dict` gave; `None` if there was none.
    """
    folder = trainer.log_dir if trainer.loggers else None  # broadcasts: on all ranks
    base = Path(settings.output_dir).expanduser() if settings.output_dir else Path(folder or trainer.default_root_dir) / "cco"
    loggers = [] if trainer.fast_dev_run else list(trainer.loggers)  # type: ignore[attr-defined]
    monitor = Monitor(base, loggers, enabled=trainer.is_global_zero, draw=settings.draw_graph)
    if not history:
        return monitor
    try:
        monitor.load_state_dict(history)
    except Exception as error:  # nothing that is computed depends on it
        warnings.warn(
            f"The checkpoint's history of sensitivities can't be read ({type(error).__name__}: {error}); it begins anew.",
            CCOWarning,
            stacklevel=3,
        )
        return Monitor(base, loggers, enabled=trainer.is_global_zero, draw=settings.draw_graph)
    return monitor
