"""What a run remembers of its epochs: a bounded number of them, so that a thousand epochs cost what twenty do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from lightning_cco.number_format import badness

FOLLOWED = 30  # layers with a curve of their own: as many as a page can show
_KEPT_FIRST, _KEPT_LAST = 10, 30  # epochs in memory: what the heat map shows
_SAVED_FIRST, _SAVED_LAST, _SAVED_LAYERS = 4, 12, 40  # in a checkpoint: a few kilobytes


class History:
    """Quantization Sensitivity by epoch and layer, and what became of each metric.

    Attributes:
        epochs: For the first and the last epochs their number and the QS by layer, in order.
        extremes: By metric ``lowest``, ``lowest_epoch``, ``highest``, ``highest_epoch``, of all epochs.
        previous: Metrics of the last epoch.
        followed: The layers that have a curve of their own.
        count: How many epochs were measured.
    """

    def __init__(self) -> None:
        self.epochs: list[tuple[int, dict[str, float]]] = []
        self.extremes: dict[str, dict[str, float]] = {}
        self.previous: dict[str, float] = {}
        self.followed: list[str] = []
        self.count = 0

    def add(self, epoch: int, qs: Mapping[str, float], metrics: Mapping[str, float]) -> None:
        """Remember an epoch. One that is run again takes the place of what came from it on."""
        self.epochs = _thinned([entry for entry in self.epochs if entry[0] < epoch] + [(epoch, dict(qs))], _KEPT_FIRST, _KEPT_LAST)
        self.count += 1
        for name, value in metrics.items():
            best = self.extremes.setdefault(name, {"lowest": value, "lowest_epoch": epoch, "highest": value, "highest_epoch": epoch})
            if value < best["lowest"] or math.isnan(best["lowest"]):
                best["lowest"], best["lowest_epoch"] = value, epoch
            if value > best["highest"] or math.isnan(best["highest"]):
                best["highest"], best["highest_epoch"] = value, epoch

    def state_dict(self) -> dict[str, Any]:
        """A few kilobytes of plain data: of the epochs only some, and of these the layers that are the most sensitive now."""
        latest = self.epochs[-1][1] if self.epochs else {}
        worst = sorted(latest, key=lambda name: -badness(latest[name]))[:_SAVED_LAYERS]
        layers = [name for name in latest if name in set(worst)]
        saved = _thinned(self.epochs, _SAVED_FIRST, _SAVED_LAST)
        return {
            "layers": layers,
            "epochs": [epoch for epoch, _ in saved],
            "qs": [[values.get(name) for name in layers] for _, values in saved],
            "extremes": {name: dict(best) for name, best in self.extremes.items()},
            "previous": dict(self.previous),
            "followed": list(self.followed),
            "count": self.count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; also from one of a version that kept every epoch under ``history``.

        Raises:
            ValueError: Some value can't be what it is; the message names the key, and nothing was taken over.
        """
        if "history" in state:
            epochs = [(_of(entry, "epoch", int), _numbers(entry, "qs")) for entry in _of(state, "history", list)]
        else:
            layers, rows, numbers = (_of(state, key, list) for key in ("layers", "qs", "epochs"))
            if len(rows) != len(numbers) or any(not isinstance(row, list) or len(row) != len(layers) for row in rows):
                raise ValueError("qs: expected a row of one value for each layer for each epoch")
            rows = [{name: value for name, value in zip(layers, row, strict=True) if value is not None} for row in rows]
            epochs = [
                (_of({"epochs": number}, "epochs", int), _numbers({"qs": row}, "qs")) for number, row in zip(numbers, rows, strict=True)
            ]
        if any(later <= earlier for (earlier, _), (later, _) in pairwise(epochs)):
            raise ValueError("epochs: expected each once, in order")
        extremes = {name: _numbers({"extremes": best}, "extremes") for name, best in _of(state, "extremes", dict).items()}
        if any(set(best) != {"lowest", "lowest_epoch", "highest", "highest_epoch"} for best in extremes.values()):
            raise ValueError("extremes: expected lowest and highest of each metric, and their epochs")
        followed = _of(state, "followed", list)
        if not all(isinstance(name, str) for name in [*followed, *extremes]):
            raise ValueError("followed, extremes: expected names")
        previous, count = _numbers(state, "previous"), _of(state, "count", int) if "count" in state else len(epochs)
        self.epochs = _thinned(epochs, _KEPT_FIRST, _KEPT_LAST)
        self.extremes, self.previous, self.followed, self.count = extremes, previous, list(followed), max(0, count)


def _of(state: Any, key: str, kind: type) -> Any:
    value = state.get(key) if isinstance(state, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{key}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _numbers(state: Any, key: str) -> dict[str, float]:
    found: dict[str, float] = dict(_of(state, key, dict))
    for name, value in found.items():
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{key}: expected numbers by name, got {type(value).__name__}")
    return found


def _thinned(epochs: list[tuple[int, dict[str, float]]], first: int, last: int) -> list[tuple[int, dict[str, float]]]:
    return epochs if len(epochs) <= first + last else [*epochs[:first], *epochs[-last:]]


def worth_showing(count: int) -> bool:
    """Whether an epoch's pictures and tables go to the loggers: each of the first 20 epochs', then ever fewer, since their files grow with each.

    >>> [count for count in range(1, 101) if worth_showing(count)][18:]
    [19, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 44, 48, 52, 56, 60, 64, 68, 72, 76, 80, 88, 96]
    """
    return count <= 20 or count % 2 ** int(math.log2(count / 10)) == 0
