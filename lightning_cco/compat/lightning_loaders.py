"""The training loop's iterator over its loaders, and the parts of loaders that it, and a copy of it, need.

Where one of the attributes is missing, the start of the training raises an `AttributeError` that names it: batches are never lost without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

from lightning_cco.compat.resolve import needed

Stateful: Any = needed("lightning.fabric.utilities.types._Stateful")
"""Protocol of loaders with a state in checkpoints, for `isinstance`. Needed."""

set_sampler_epoch: Callable[[Any, int], None] = needed("lightning.fabric.utilities.data._set_sampler_epoch")
"""Tells a loader's samplers the epoch, which seeds their shuffling. Needed."""


def training_fetcher(trainer: pl.Trainer) -> Any:
    """The fetcher of the training loop; `None` before the loop has set its data up.

    Private API: ``fit_loop._data_fetcher``.
    """
    return trainer.fit_loop._data_fetcher


def training_loader(trainer: pl.Trainer) -> CombinedLoader | None:
    """The training loop's loaders as one.

    Private API: ``fit_loop._combined_loader``.
    """
    return trainer.fit_loop._combined_loader


def reload_if_due(trainer: pl.Trainer) -> None:
    """Set the training's data up again where the loop would before its next batch (``reload_dataloaders_every_n_epochs``).

    Private API: ``fit_loop._should_reload_train_dl``.
    """
    if trainer.fit_loop._should_reload_train_dl:
        trainer.fit_loop.setup_data()


def loader_of(fetcher: Any) -> Any:
    """What a fetcher iterates over when it begins, of whatever type.

    Private API: ``_DataFetcher._combined_loader``.
    """
    return fetcher._combined_loader


def set_loader_of(fetcher: Any, loader: Any) -> None:
    """Let a fetcher iterate this when it begins the next time.

    Private API: ``_DataFetcher._combined_loader``.
    """
    fetcher._combined_loader = loader


def loader_states(combined: CombinedLoader) -> list[dict[str, Any]]:
    """The states of loaders that have some, as a checkpoint keeps them, whatever `replace_loader_states` has put in their place.

    Private API: ``CombinedLoader._state_dicts``.
    """
    return CombinedLoader._state_dicts(combined)


def replace_loader_states(combined: CombinedLoader, states: Callable[[], list[dict[str, Any]]] | None) -> None:
    """Let a checkpoint keep other states than those that the loaders have now; `None`: these again.

    Private API: ``CombinedLoader._state_dicts``.
    """
    combined.__dict__.pop("_state_dicts", None)
    if states is not None:
        combined._state_dicts = states  # type: ignore[method-assign]


def mode_of(combined: CombinedLoader) -> Any:
    """How several loaders are combined (``max_size_cycle``, …).

    Private API: ``CombinedLoader._mode``.
    """
    return combined._mode


def is_plain_loader(loader: Any) -> bool:
    """Whether a `DataLoader` iterates as PyTorch's own does, whatever its class.

    Private API: ``DataLoader._get_iterator``. Without it: no loader is plain, so none is copied and the batches of the calibration are always drawn early.
    """
    own, base = getattr(type(loader), "_get_iterator", None), getattr(DataLoader, "_get_iterator", None)
    return isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__ and base is not None and own is base


NOT_BEGUN = {"_iterator": None}
"""Attributes of a `DataLoader` that has not been iterated yet.

Private API: ``DataLoader._iterator``, where persistent workers are kept. Under another name: copies still ask for none by ``persistent_workers=False``.
"""
