"""What is trained on, batch by batch, is what a run without the callback trains on, whatever gives the batches."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from lightning_modules import make_trainer, quick
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler, Sampler

from lightning_cco import CCOCallback

N = 24

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|use of fork|not resumable|max_epochs|draws random numbers in this process).*"
)


class Samples(Dataset):
    """Sample i, and the random numbers that came with it."""

    def __init__(self, augment: bool = False) -> None:
        self.augment, self.calls = augment, 0
        self.rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, int, float]:
        self.calls += 1
        noise = random.random() + float(torch.rand(())) + float(np.random.rand()) if self.augment else float(self.rng.random()) + self.calls
        return torch.linspace(-1, 1, 8) * i, i, noise


class Popping(IterableDataset):
    """A stream that gives each sample once, over all epochs."""

    def __init__(self) -> None:
        self.queue: queue.Queue[int] = queue.Queue()
        for i in range(3 * N):
            self.queue.put(i)

    def __iter__(self) -> Iterator[Any]:
        while not self.queue.empty():
            i = self.queue.get()
            yield torch.linspace(-1, 1, 8) * i, i, 0.0


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        while True:
            i = int(torch.randint(0, 100, ()))
            yield torch.linspace(-1, 1, 8) * i, i, random.random()


class EachEpochAnother(Sampler):
    """Counts its epochs, and draws as it goes."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        for _ in range(N):
            yield (int(torch.randint(0, N, ())) + self.epoch) % N

    def __len__(self) -> int:
        return N


class Plain:
    """Not a DataLoader at all; goes on where it was."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Any]:
        for _ in range(6):
            self.at += 1
            yield torch.randn(4, 8), torch.full((4,), self.at), 0.0


class Stateful(Plain):
    """Keeps its place for checkpoints."""

    def __iter__(self) -> Iterator[Any]:
        self.at %= 6
        while self.at < 6:
            self.at += 1
            yield torch.randn(4, 8), torch.full((4,), self.at), 0.0

    def __len__(self) -> int:
        return 6

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def stream() -> Iterator[Any]:
    for i in range(12):
        yield torch.randn(4, 8), torch.full((4,), i), 0.0


class Reading(pl.LightningModule):
    """Notes the ids that it is trained on, uses random numbers itself, and writes to its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = _parts(batch)[0][0]
        loss = F.cross_entropy(self(x / 24), torch.zeros(len(x), dtype=torch.long))
        x.mul_(0)  # whoever kept this batch sees it
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append([self.current_epoch, *([part[1].tolist(), torch.as_tensor(part[2]).tolist()] for part in _parts(batch))])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def _parts(batch: Any) -> list[Any]:
    """The batches of several loaders, or the one."""
    several = list(batch.values()) if isinstance(batch, dict) else batch if not isinstance(batch[0], Tensor) else [batch]
    return [part for part in several if part is not None]


def seen(folder: Path, make: Callable[[], Any], cco: CCOCallback | None, fit: dict[str, Any] | None = None, **options: Any) -> list[Any]:
    """Ids of each batch trained on, and the random state afterwards."""
    pl.seed_everything(1, verbose=False)
    model = Reading()
    trainer = make_trainer(folder, *([cco] if cco else []), **{"max_epochs": 2, **options})
    loaders = make()
    given = {"datamodule": loaders} if isinstance(loaders, pl.LightningDataModule) else {"train_dataloaders": loaders}
    trainer.fit(model, **given, **(fit or {}))
    return [*model.seen, random.random(), float(np.random.rand()), float(torch.rand(()))]


def both(folder: Path, make: Callable[[], Any], **options: Any) -> list[Any]:
    expected = seen(folder, make, None, **options)
    cco = quick(training_settings={"stats_steps": 5}, monitoring_settings={"draw_graph": False, "sensitivity_batches": 2})
    got = seen(folder, make, cco, **options)
    assert got == expected
    assert cco.quantized is not None
    assert cco.quantized.calibrated
    return expected[:-3]


def shuffled(**options: Any) -> DataLoader:
    return DataLoader(Samples(options.pop("augment", False)), 4, shuffle=True, **options)


LOADERS: dict[str, Callable[[], Any]] = {
    "counting dataset with a generator of its own": lambda: shuffled(),
    "generator": lambda: shuffled(generator=torch.Generator().manual_seed(7)),
    "augmented in this process": lambda: shuffled(augment=True),
    "augmented in workers": lambda: shuffled(augment=True, num_workers=2),
    "persistent workers": lambda: shuffled(augment=True, num_workers=2, persistent_workers=True),
    "no batching": lambda: DataLoader([(torch.randn(4, 8), torch.full((4,), i), 0.0) for i in range(5)], batch_size=None, shuffle=True),
    "batch sampler": lambda: DataLoader(Samples(), batch_sampler=BatchSampler(RandomSampler(range(N)), 5, drop_last=True)),
    "sampler with state": lambda: DataLoader(Samples(augment=True), 4, sampler=EachEpochAnother()),
    "sampler with state, workers": lambda: DataLoader(Samples(), 4, sampler=EachEpochAnother(), num_workers=1),
    "distributed sampler": lambda: DataLoader(Samples(), 4, sampler=DistributedSampler(Samples(), 2, 0)),
    "queue": lambda: DataLoader(Popping(), 4),
    "generator object": stream,
    "no loader": lambda: Plain(),
    "stateful": lambda: Stateful(),
    "two in a mapping": lambda: {"a": shuffled(), "b": DataLoader(Samples(), 7)},
    "two in a list": lambda: [DataLoader(Samples(augment=True), 12), shuffled(augment=True)],
    "shortest": lambda: CombinedLoader([DataLoader(Samples(), 8), DataLoader(Popping(), 4)], "min_size"),
    "longest": lambda: CombinedLoader([DataLoader(Samples(), 4), DataLoader(Samples(), 12)], "max_size"),
}


@pytest.mark.parametrize("name", list(LOADERS))
def test_every_batch_is_that_of_the_float_run(name: str, tmp_path: Path) -> None:
    assert len(both(tmp_path, LOADERS[name])) >= 3


OPTIONS: dict[str, dict[str, Any]] = {
    "limited": {"limit_train_batches": 2},
    "overfit": {"overfit_batches": 2},
    "accumulated": {"accumulate_grad_batches": 3},
    "steps": {"max_steps": 3},
    "reloaded": {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3},
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_with_options_of_the_trainer(name: str, tmp_path: Path) -> None:
    both(tmp_path, shuffled if name != "overfit" else lambda: DataLoader(Samples(), 4), **OPTIONS[name])
    if name not in ("overfit", "reloaded"):
        both(tmp_path, lambda: DataLoader(Popping(), 4), **OPTIONS[name])


def test_an_endless_stream(tmp_path: Path) -> None:
    """Its random numbers are those of this process: the ids come in their order, though the dropout's are drawn in between in the float run."""
    got = both(tmp_path, lambda: DataLoader(Endless(), 4, num_workers=1), limit_train_batches=6)
    assert len(got) == 12


def test_a_data_module_is_asked_as_often(tmp_path: Path) -> None:
    asked = []

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            asked.append(len(asked))
            return shuffled()

    both(tmp_path, Data)
    assert len(asked) == 2


def test_a_second_fit(tmp_path: Path) -> None:
    def run(cco: CCOCallback | None) -> list[Any]:
        pl.seed_everything(1, verbose=False)
        model, loaders = Reading(), [shuffled(num_workers=1, persistent_workers=True), shuffled(), stream()]
        trainer = make_trainer(tmp_path, *([cco] if cco else []), limit_train_batches=3)
        for epochs, loader in enumerate(loaders, 1):
            trainer.fit_loop.max_epochs = epochs
            trainer.fit(model, loader)
        return model.seen

    assert run(quick()) == run(None)


def resumed(folder: Path, make: Callable[[], Any], cco: CCOCallback | None, fresh: CCOCallback | None, steps: int = 2) -> list[Any]:
    pl.seed_everything(1, verbose=False)
    checkpoint = ModelCheckpoint(folder, filename="at", every_n_train_steps=steps, save_top_k=-1)
    first = Reading()
    make_trainer(folder, checkpoint, *([cco] if cco else []), max_epochs=1, max_steps=steps).fit(first, make())
    pl.seed_everything(2, verbose=False)
    second = Reading()
    make_trainer(folder, *([fresh] if fresh else []), max_epochs=2).fit(second, make(), ckpt_path=checkpoint.best_model_path)
    return [*first.seen, *second.seen]


@pytest.mark.parametrize("kind", ["stateful", "shuffled"])
@pytest.mark.parametrize("known", [True, False], ids=["with our state", "without"])
def test_resume_in_the_middle_of_an_epoch(kind: str, known: bool, tmp_path: Path) -> None:
    make = Stateful if kind == "stateful" else shuffled
    expected = resumed(tmp_path / "float", make, None, None)
    if kind == "stateful":
        assert [entry[1][0][0] for entry in expected] == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6]
    assert resumed(tmp_path / "cco", make, quick() if known else None, quick()) == expected


@pytest.mark.parametrize("kind", ["stateful", "shuffled"])
@pytest.mark.parametrize("known", [True, False], ids=["with our state", "without"])
def test_resume_after_the_last_batch_of_an_epoch(kind: str, known: bool, tmp_path: Path) -> None:
    """Of a checkpoint that was saved after the epoch's last batch, but before its end."""
    make = Stateful if kind == "stateful" else shuffled
    expected = resumed(tmp_path / "float", make, None, None, steps=6)
    assert len(expected) == 12
    assert resumed(tmp_path / "cco", make, quick() if known else None, quick(), steps=6) == expected
