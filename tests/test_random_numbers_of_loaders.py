"""Orders and augmentations drawn in this process are those of a run without the callback, also where hooks draw in between; else a warning says so."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from lightning_modules import make_trainer, quick
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset, WeightedRandomSampler

from lightning_cco import CCOCallback, CCOWarning

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|use of fork|not resumable|max_epochs).*")


def noise() -> float:
    return float(torch.rand(())) + random.random() + float(np.random.rand())


class Samples(Dataset):
    def __init__(self, augment: bool = False) -> None:
        self.augment = augment

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[Tensor, int, float]:
        return torch.linspace(-1, 1, 8), i, noise() if self.augment else 0.0


class Transform:
    """Of a user: draws from a generator of its own, and counts."""

    def __init__(self) -> None:
        self.random, self.counts = random.Random(0), {"calls": 0}

    def __call__(self, value: float) -> float:
        self.counts["calls"] += 1
        return value + self.random.random() + self.counts["calls"]


class Counting(Samples):
    """Keeps something between its samples, in itself and in a transform, and draws this process's random numbers, too."""

    def __init__(self) -> None:
        super().__init__(augment=True)
        self.own, self.torch, self.transforms = np.random.default_rng(0), torch.Generator().manual_seed(0), [Transform()]

    def __getitem__(self, i: int) -> tuple[Tensor, int, float]:
        x, i, value = super().__getitem__(i)
        return x, i, self.transforms[0](value) + float(self.own.random()) + float(torch.rand((), generator=self.torch))


GLOBAL = np.random.default_rng(0)


class OfAModule(Samples):
    """Draws from a generator that its module holds."""

    def __getitem__(self, i: int) -> tuple[Tensor, int, float]:
        return *super().__getitem__(i)[:2], float(GLOBAL.random())


def collating() -> Callable[[Any], Any]:
    """A function that keeps a generator, and counts."""
    own, calls = random.Random(0), [0]

    def collate(samples: list[Any]) -> list[Any]:
        calls[0] += 1
        return [torch.stack([x for x, *_ in samples]), [i for _, i, _ in samples], [own.random() + calls[0] for _ in samples]]

    return collate


class Stream(IterableDataset):
    def __init__(self, augment: bool = True) -> None:
        self.samples = Samples(augment)

    def __iter__(self) -> Iterator[Any]:
        return (self.samples[i] for i in range(24))


class Reading(pl.LightningModule):
    """Notes ids and noise of each batch; ``hooks`` draw random numbers before the first batch of an epoch, ``dropout`` after each."""

    def __init__(self, hooks: bool, dropout: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.3 if dropout else 0.0), nn.Linear(8, 2))
        self.hooks, self.seen = hooks, []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        self.seen.append([self.current_epoch, *([torch.as_tensor(value).tolist() for value in part[1:]] for part in parts)])
        return self(parts[0][0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def on_train_start(self) -> None:
        self.seen.append(noise() if self.hooks else 0.0)

    def on_train_epoch_start(self) -> None:
        self.on_train_start()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def seen(
    folder: Path,
    loader: Callable[[], Any],
    cco: CCOCallback | None,
    hooks: bool = False,
    dropout: bool = False,
    val: bool = False,
    fits: int = 1,
) -> list[Any]:
    pl.seed_everything(1, verbose=False)
    GLOBAL.bit_generator.state = np.random.default_rng(0).bit_generator.state
    model, trainer = Reading(hooks, dropout), make_trainer(folder, *([cco] if cco else []), max_epochs=2)
    for fit in range(fits):
        trainer.fit_loop.max_epochs = 2 + fit
        trainer.fit(model, loader(), DataLoader(Samples(), 8, shuffle=True) if val else None)
    return [*model.seen, noise()]


def callback(steps: int = 4, sensitivity_batches: int = 2) -> CCOCallback:
    return quick(
        training_settings={"stats_steps": steps}, monitoring_settings={"draw_graph": False, "sensitivity_batches": sensitivity_batches}
    )


def shuffled(augment: bool = False, **options: Any) -> DataLoader:
    return DataLoader(Samples(augment), 4, **{"shuffle": True, **options})


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": shuffled,
    "augmented": lambda: shuffled(augment=True),
    "generator": lambda: shuffled(augment=True, generator=torch.Generator().manual_seed(3)),
    "weighted": lambda: shuffled(shuffle=False, sampler=WeightedRandomSampler([1.0] * 24, 20)),
    "replacement": lambda: shuffled(shuffle=False, sampler=RandomSampler(range(24), replacement=True)),
    "counting": lambda: DataLoader(Subset(Counting(), range(20)), 4, shuffle=True),
    "module": lambda: DataLoader(OfAModule(), 4, shuffle=True),
    "collate": lambda: shuffled(collate_fn=collating()),
    "partial": lambda: shuffled(collate_fn=partial(lambda collate, samples: collate(samples), collating())),
    "workers": lambda: shuffled(augment=True, num_workers=1, persistent_workers=True),
    "two": lambda: CombinedLoader({"a": shuffled(True), "b": DataLoader(Samples(), 3, shuffle=True)}, "min_size"),
    "stream": lambda: DataLoader(Stream(augment=False), 4),
}


@pytest.mark.parametrize("name", LOADERS)
def test_hooks_may_draw_before_the_first_batch(name: str, tmp_path: Path) -> None:
    options = {"hooks": True, "dropout": True, "val": name == "augmented", "fits": 2 if name in ("shuffled", "generator", "workers") else 1}
    wanted = seen(tmp_path / "float", LOADERS[name], None, **options)
    assert seen(tmp_path / "cco", LOADERS[name], callback(), **options) == wanted


def test_validation_data_that_keep_something_are_those_of_the_float_run(tmp_path: Path) -> None:
    """They are read once more before the training, for what the calibration alone gives."""

    def run(folder: Path, *callbacks: pl.Callback) -> Counting:
        pl.seed_everything(1, verbose=False)
        data = Counting()
        make_trainer(folder, *callbacks, num_sanity_val_steps=-1).fit(Reading(False, True), shuffled(), DataLoader(data, 8))
        return data

    data, wanted = run(tmp_path / "cco", callback()), run(tmp_path / "float")
    assert (data.own.random(), data.transforms[0].counts) == (wanted.own.random(), wanted.transforms[0].counts)


@pytest.mark.parametrize("steps", [6, 4])
def test_a_validation_comes_first_after_a_resume(steps: int, tmp_path: Path) -> None:
    """Of a checkpoint from the end of an epoch, or the middle: loaders begin where the float run's do, with the numbers of that moment."""

    def run(folder: Path, *callbacks: pl.Callback) -> list[Any]:
        pl.seed_everything(1, verbose=False)
        saved = ModelCheckpoint(folder, filename="at", every_n_train_steps=steps)
        make_trainer(folder, saved, max_steps=steps).fit(Reading(True, True), shuffled(True), shuffled())
        pl.seed_everything(2, verbose=False)
        model = Reading(True, True)
        make_trainer(folder, *callbacks, max_epochs=3).fit(model, shuffled(True), shuffled(), ckpt_path=saved.best_model_path)
        return [*model.seen, noise()]

    assert run(tmp_path / "cco", callback()) == run(tmp_path / "float")


@pytest.mark.parametrize(
    "stream", [lambda: DataLoader(Stream(), 4), lambda: DataLoader(Stream(), None), lambda: {"a": DataLoader(Stream(), 4), "b": shuffled()}]
)
def test_a_stream_that_draws_beside_dropout_is_said(stream: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.warns(CCOWarning, match=r"draws random numbers in this process.*No sample is lost.*stats_steps") as caught:
        got = seen(tmp_path / "cco", stream, callback(), dropout=True)
    assert sum("draws random" in str(warning.message) for warning in caught) == 1
    wanted = seen(tmp_path / "float", stream, None, dropout=True)
    ids = [[part[0] for part in entry[1:]] for entry in wanted if isinstance(entry, list)]
    assert [[part[0] for part in entry[1:]] for entry in got if isinstance(entry, list)] == ids


@pytest.mark.parametrize(("steps", "dropout"), [(4, False), (1, True)], ids=["nothing else draws", "one batch"])
def test_a_stream_whose_numbers_are_those_of_the_float_run_is_not(steps: int, dropout: bool, tmp_path: Path) -> None:
    def stream() -> DataLoader:
        return DataLoader(Stream(), 4)

    wanted = seen(tmp_path / "float", stream, None, dropout=dropout)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CCOWarning)
        assert seen(tmp_path / "cco", stream, callback(steps, min(steps, 2)), dropout=dropout) == wanted


class DrawsOfNumPy(IterableDataset):
    """Its numbers are NumPy's, which dropout does not draw."""

    def __iter__(self) -> Iterator[Any]:
        return ((torch.linspace(-1, 1, 8) * i, i, float(np.random.rand())) for i in range(24))


def test_a_stream_that_draws_of_another_library_than_dropout_is_not(tmp_path: Path) -> None:
    def stream() -> DataLoader:
        return DataLoader(DrawsOfNumPy(), 4)

    wanted = seen(tmp_path / "float", stream, None, dropout=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CCOWarning)
        assert seen(tmp_path / "cco", stream, callback(), dropout=True) == wanted


def test_what_an_interrupt_loses_of_a_stream_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Interrupted(Reading):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("interrupted")

    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError, match="interrupted"):
        make_trainer(tmp_path, callback()).fit(Interrupted(False, False), DataLoader(Stream(augment=False), 4))
    assert "interrupted before 2 batches of the training loader that the calibration had drawn were trained on" in caplog.text
