"""Reading from a copy of a training loader, where reading from the loader itself would change what is trained on."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import IterableDataset

from lightning_cco.compat.lightning_loaders import NOT_BEGUN, fetchers_of, is_plain_loader, mode_of


def spare_loader(trainer: pl.Trainer, combined: CombinedLoader) -> CombinedLoader | None:
    """A loader of the same data with samplers, generators and workers of its own; `None` where there can't be one.

    Only a `DataLoader` of a dataset with indices can be copied: a stream gives each sample once, and of other iterables nothing is known.
    """
    copies = []
    for loader in combined.flattened:
        if not _can_be_copied(loader):
            return None
        # What samplers may refer to and must not be copied.
        shared = (loader.dataset, trainer, trainer.lightning_module, getattr(trainer, "datamodule", None))
        try:
            own = copy.deepcopy(
                {name: loader.__dict__.get(name) for name in ("sampler", "batch_sampler", "generator")}, {id(item): item for item in shared}
            )
        except Exception:  # locks, open files, generators: the sampler's own business
            return None
        twin = object.__new__(type(loader))
        twin.__dict__.update(loader.__dict__)
        twin.__dict__.update(own, **NOT_BEGUN, persistent_workers=False)
        copies.append(twin)
    spare = CombinedLoader(combined.iterables, mode_of(combined))
    spare.flattened = copies
    return spare


def _can_be_copied(loader: Any) -> bool:
    return is_plain_loader(loader) and not isinstance(loader.dataset, IterableDataset) and not hasattr(loader, "state_dict")


def draws_by_a_known_order(combined: CombinedLoader) -> bool:
    """Whether all samplers are PyTorch's or Lightning's, which fix their order when they begin. Others may draw as they go, or heed the training."""
    for loader in combined.flattened:
        sampler = getattr(loader, "sampler", None)
        batch_sampler = getattr(loader, "batch_sampler", None)
        for item in (sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
            known = type(item).__module__.startswith(("torch.", "lightning.", "builtins"))
            if item is not None and not known:
                return False
    return True


@contextmanager
def watching_random(combined: CombinedLoader) -> Iterator[list[bool]]:
    """Notes whether loading a batch in this process draws from a global random state; the list then is not empty. The samplers' seeds don't count."""
    used: list[bool] = []
    found = fetchers_of(combined)
    if found is None:
        used.append(True)
    fetchers = found or []

    def watch(fetcher: Any) -> None:
        fetch = fetcher.fetch

        def watched(index: Any) -> Any:
            before = _random_state()
            try:
                return fetch(index)
            finally:
                if _random_state() != before:
                    used.append(True)

        fetcher.fetch = watched

    for fetcher in fetchers:
        watch(fetcher)
    try:
        yield used
    finally:
        for fetcher in fetchers:
            fetcher.__dict__.pop("fetch", None)


def _random_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, np.asarray(keys).tobytes(), *rest, torch.get_rng_state().numpy().tobytes()


def read_apart(spare: CombinedLoader) -> Iterator[Any]:
    """The batches of a spare loader, the same ones each time: under a random state, a default type and a gradient mode of their own.

    The iteration may be used inside of any context, such as one with another default type.
    """
    dtype = torch.get_default_dtype()

    def read() -> Iterator[Any]:
        iterator: Iterator[Any] | None = None
        state: Any = None
        try:
            while True:
                with isolated_random(), _as_outside(dtype), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
                    if iterator is None:
                        torch.manual_seed(0)
                        random.seed(0)
                        np.random.seed(0)
                        iterator = iter(spare)
                    else:
                        _set_random(state)
                    try:
                        batch, _, _ = next(iterator)
                    except StopIteration:
                        return
                    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
                yield batch
        finally:
            spare.reset()

    return read()


def _set_random(state: Any) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


@contextmanager
def _as_outside(dtype: torch.dtype) -> Iterator[None]:
    now = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(now)


@contextmanager
def isolated_random() -> Iterator[None]:
    """Lightning's `isolate_rng`, which by itself puts nothing back when an exception leaves it, such as that of a generator dropped halfway."""
    stack = ExitStack()
    stack.enter_context(isolate_rng())
    try:
        yield
    finally:
        stack.close()
