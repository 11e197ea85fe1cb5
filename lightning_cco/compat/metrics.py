"""The state of torchmetrics' metrics: what a rehearsed step changes and has to be put back."""

from __future__ import annotations

from typing import Any

from torchmetrics import Metric


def saved_state(metric: Metric) -> tuple[dict[str, Any], int, Any]:
    """A copy of what a metric has accumulated.

    Private API: ``Metric._defaults``, ``_update_count`` and ``_computed``. Without one of them: `AttributeError` before the training begins.
    """
    return {name: _copied(getattr(metric, name)) for name in metric._defaults}, metric._update_count, metric._computed


def restore_state(metric: Metric, saved: tuple[dict[str, Any], int, Any]) -> None:
    """Let a metric have accumulated what it had at `saved_state`.

    Private API: as there.
    """
    states, metric._update_count, metric._computed = saved
    for name, state in states.items():
        setattr(metric, name, state)


def syncs(metric: Metric) -> bool:
    """Whether a metric that is computed now is to add up what other processes have accumulated.

    Private API: ``Metric._to_sync``. Without it: always.
    """
    return bool(getattr(metric, "_to_sync", True))


def _copied(state: Any) -> Any:
    return [item.clone() for item in state] if isinstance(state, list) else state.clone()
