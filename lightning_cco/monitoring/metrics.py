"""A run's metrics: what was logged as plain numbers, and the numbers that a compression adds."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_cco.compat.lightning_trainer import running_results
from lightning_cco.quantization.model import HookedModel
from lightning_cco.sensitivity import SensitivityReport
from lightning_cco.suggestions import Suggestion


def sanity_check_metrics(trainer: pl.Trainer) -> dict[str, Any]:
    """What the sanity check logged. With several loaders Lightning drops it instead of showing it in ``callback_metrics``."""
    metrics: dict[str, Any] = dict(trainer.callback_metrics)
    results = running_results(trainer)
    if results is not None and len(trainer.num_sanity_val_batches) > 1:
        for results.dataloader_idx in range(len(trainer.num_sanity_val_batches)):
            metrics.update(results.metrics(on_step=False)["callback"])
        results.dataloader_idx = None
    return metrics


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The single values among a run's metrics, without those of the compression."""
    found = {}
    for name, value in metrics.items():
        if name.startswith("cco/"):
            continue
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # no number: text, a complex value
            tensor = torch.as_tensor(value)
            if tensor.numel() == 1:
                found[name] = float(tensor)
    return found


def monitored_values(report: SensitivityReport, quantized: HookedModel, suggestions: Sequence[Suggestion]) -> dict[str, float]:
    """What the callback logs each epoch, for ``monitor=`` of others."""
    values = [entry.qs for entry in (report.local or report.accumulated).values()]
    ratios = [entry.sqnr_db for entry in (report.local or report.accumulated).values()]
    return {
        "cco/qs_max": max(values, default=0.0),
        "cco/qs_mean": sum(values) / max(1, len(values)),
        "cco/sqnr_min": min(ratios, default=float("inf")),
        "cco/num_quantized_layers": float(len(quantized.plan.quantized)),
        "cco/num_suggested_skips": float(len(suggestions)),
    }
