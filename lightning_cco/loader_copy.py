"""Reading from a copy of a training loader, where reading from the loader itself would change what is trained on."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import IterableDataset

from lightning_cco.compat.lightning_loaders import NOT_BEGUN, is_plain_loader, mode_of
from lightning_cco.dataset_copy import Apart, set_generator, state_of_generator
from lightning_cco.graph.snapshot import Snapshot
from lightning_cco.random_numbers import RandomState, isolated_random
from lightning_cco.repeatable_data import gives_again

_OUTSIDE = "_lightning_cco_outside"
"""Where a spare loader keeps what its data may change outside of itself."""


def copied_loader(trainer: pl.Trainer, combined: CombinedLoader, streams: bool = False) -> CombinedLoader | None:
    """A loader of the same data with samplers, generators and workers of its own, or with what data keep between samples; `None` where there can't be one.

    Only a `DataLoader` of a dataset with indices can be copied: a stream may give each sample once, and of other iterables nothing is known.

    Args:
        trainer: The Trainer.
        combined: The loaders.
        streams: Whether to copy streams, too, that hold nothing which exists once.
    """
    copies, generators, code = [], list[Any](), list[Any]()
    for loader in combined.flattened:
        if not _can_be_copied(loader, streams):
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
        if not loader.num_workers:
            apart = Apart(shared[1:])
            twin.__dict__.update(dataset=apart.twin(loader.dataset), collate_fn=apart.twin(loader.collate_fn))
            generators += apart.generators
            code += apart.code
        code += [type(item) for name in ("sampler", "batch_sampler") for item in _samplers(loader.__dict__.get(name))]
        copies.append(twin)
    spare = CombinedLoader(combined.iterables, mode_of(combined))
    spare.flattened = copies
    vars(spare)[_OUTSIDE] = (generators, code)
    return spare


def _samplers(sampler: Any) -> list[Any]:
    """A sampler, and the one inside of it."""
    return [item for item in (sampler, getattr(sampler, "sampler", None)) if item is not None]


def _can_be_copied(loader: Any, streams: bool) -> bool:
    if not is_plain_loader(loader) or hasattr(loader, "state_dict"):
        return False
    return not isinstance(loader.dataset, IterableDataset) or (streams and gives_again([loader.dataset, loader.collate_fn]))


class _Behind:
    """The rest of what a sampler gives."""

    def __init__(self, sampler: Any, count: int) -> None:
        self._sampler, self._count = sampler, count

    def __iter__(self) -> Iterator[Any]:
        return islice(self._sampler, self._count, None)

    def __len__(self) -> int:
        return max(0, len(self._sampler) - self._count)


def skip_batches(loader: Any, count: int) -> None:
    """Let a spare loader begin after its first batches, which are not loaded for it."""
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    if count:
        loader.__dict__[name] = _Behind(loader.__dict__[name], count)


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


def read_from_copy(spare: CombinedLoader) -> Iterator[Any]:
    """The batches of a spare loader, the same ones each time: under a random state, a default type and a gradient mode of their own.

    The iteration may be used inside of any context, such as one with another default type.
    """
    dtype = torch.get_default_dtype()
    outside = _Outside(spare)

    def read() -> Iterator[Any]:
        iterator: Iterator[Any] | None = None
        state: RandomState | None = None
        try:
            while True:
                with isolated_random(), outside.put_back(), _as_outside(dtype), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
                    if iterator is None or state is None:
                        torch.manual_seed(0)
                        random.seed(0)
                        np.random.seed(0)
                        iterator = iter(spare)
                    else:
                        state.restore()
                    try:
                        batch, _, _ = next(iterator)
                    except StopIteration:
                        return
                    state = RandomState()
                yield batch
        finally:
            spare.reset()

    return read()


def keeping_global_state(spare: CombinedLoader) -> AbstractContextManager[None]:
    """Put what a spare loader's data may change outside of itself back at the end of the block."""
    return _Outside(spare).put_back()


class _Outside:
    """What data change outside of themselves: generators under global names, and what their code keeps in classes, functions and global names.

    Args:
        spare: The loader of these data.
    """

    def __init__(self, spare: CombinedLoader) -> None:
        generators, self._code = vars(spare).get(_OUTSIDE, ((), ()))
        self._generators = [(generator, state_of_generator(generator)) for generator in generators]
        self._inside: Snapshot | None = None

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Let the data go on from a state of their own inside of the block; afterwards everything is as before."""
        outside = [state_of_generator(generator) for generator, _ in self._generators]
        kept = Snapshot(None, others=self._code)
        for generator, state in self._generators:
            set_generator(generator, state)
        if self._inside is not None:
            self._inside.restore()
        try:
            yield
        finally:
            self._inside = Snapshot(None, others=self._code, iterators=False)
            kept.restore()
            for number, (generator, _) in enumerate(self._generators):
                self._generators[number] = (generator, state_of_generator(generator))
                set_generator(generator, outside[number])


@contextmanager
def _as_outside(dtype: torch.dtype) -> Iterator[None]:
    now = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(now)
