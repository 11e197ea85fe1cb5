"""What torchmetrics keeps to itself."""

from __future__ import annotations

from torchmetrics import Metric


def syncs(metric: Metric) -> bool:
    """Whether a metric that is computed now is to add up what other processes have accumulated.

    Private API: ``Metric._to_sync``. Without it: always.
    """
    return bool(getattr(metric, "_to_sync", True))
