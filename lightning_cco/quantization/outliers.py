"""Batches whose values are a thousand times as wide as the range of a tensor: remembered from update to update, and said."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_cco.errors import CCOWarning
from lightning_cco.names import list_names
from lightning_cco.quantization.tensor_key import TensorKey
from lightning_cco.quantization.tracing import reads_at_once


class Outliers:
    """Which tensors' last batch was an outlier. Ranges do not follow the first one, but do follow a second one in a row, so it is part of the state.

    On an accelerator nothing here waits for the device but `names` and `warn`.
    """

    def __init__(self) -> None:
        self._keys: list[TensorKey] = []
        self._last: Tensor | None = None
        self._unsaid: Tensor | None = None

    def last(self, keys: Sequence[TensorKey], device: torch.device) -> Tensor | None:
        """Which of some tensors' last batch was an outlier, as `update_ranges` wants it.

        Args:
            keys: The tensors whose ranges move now. They may be others than before: ranges are frozen and released.
            device: Where their ranges are.

        Returns:
            Bool, of shape ``(len(keys),)``; `None` if there was no update before.
        """
        if self._last is None:
            return None
        if self._keys != keys:
            names, unsaid = set(self.names()), set(self._named(self._unsaid))
            self._keys = list(keys)
            self._last = torch.tensor([key in names for key in keys], dtype=torch.bool, device=device)
            self._unsaid = torch.tensor([key in unsaid for key in keys], dtype=torch.bool, device=device)
        if self._last.device != device:
            self._last = self._last.to(device)
            self._unsaid = self._unsaid.to(device) if self._unsaid is not None else None
        return self._last

    def note(self, keys: Sequence[TensorKey], found: Tensor) -> None:
        """Remember what `update_ranges` returned for these tensors; warn of what is new, where nobody has to wait for the device."""
        new = new_outliers(found, self.last(keys, found.device))
        self._unsaid = new if self._unsaid is None else self._unsaid | new
        self._keys, self._last = list(keys), found
        if reads_at_once(found.device):
            self.warn()

    def warn(self) -> None:
        """Name the layers that met an outlier since the last call."""
        names, self._unsaid = self._named(self._unsaid), None
        if not names:
            return
        layers = list(dict.fromkeys(key.layer for key in names))
        warnings.warn(
            f"training: a batch gave values more than a thousand times as large as the range of {list_names(layers)}. The ranges do not follow it, unless "
            "the next batch is like it. Check the samples of that batch (units, missing values) and the learning rate.",
            CCOWarning,
            stacklevel=4,
        )

    def names(self) -> list[TensorKey]:
        """The tensors whose last batch was an outlier."""
        return self._named(self._last)

    def load(self, names: Iterable[str], keys: Iterable[TensorKey]) -> None:
        """Go on from saved `names`, those that are among `keys`."""
        known = set(names)
        self._keys = [key for key in keys if key in known]
        self._last, self._unsaid = torch.ones(len(self._keys), dtype=torch.bool, device="cpu"), None

    def _named(self, found: Tensor | None) -> list[TensorKey]:
        if found is None or not bool(found.any()):
            return []
        return [key for key, is_one in zip(self._keys, found.tolist(), strict=True) if is_one]


def new_outliers(outliers: Tensor, before: Tensor | None) -> Tensor:
    """Those of an update that the update before did not have. What comes twice in a row is no outlier."""
    return outliers if before is None else outliers & ~before
