"""The validations before the training leave nothing behind: what is validated later, and what a module and callbacks keep, is as in the float run."""

from __future__ import annotations

import queue
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning_modules import make_trainer, quick
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|use of fork|max_epochs).*")


class Samples(Dataset):
    """Draws from a generator of its own, and this process's random numbers."""

    def __init__(self) -> None:
        self.own, self.given = np.random.default_rng(0), 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, float]:
        self.given += 1
        return torch.linspace(-1, 1, 8), float(self.own.random()) + float(torch.rand(())) + random.random() + self.given


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return ((torch.linspace(-1, 1, 8), float(i)) for i in range(12))


class Batches:
    def __iter__(self) -> Iterator[Any]:
        return ((torch.linspace(-1, 1, 8).repeat(4, 1), torch.arange(4.0) + at) for at in (0, 4, 8))


class Popped(IterableDataset):
    """Takes its samples out of a list, or of what it is given."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        while self.samples if isinstance(self.samples, list) else not self.samples.empty():
            yield torch.linspace(-1, 1, 8), float(self.samples.pop() if isinstance(self.samples, list) else self.samples.get())


class OfTheProgram(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        while not EVERYBODYS.empty():
            yield torch.linspace(-1, 1, 8), float(EVERYBODYS.get())


class Lines(IterableDataset):
    def __init__(self, path: Path) -> None:
        self.file = path.open()

    def __iter__(self) -> Iterator[Any]:
        while line := self.file.readline():
            yield torch.linspace(-1, 1, 8), float(line)

    def __del__(self) -> None:
        self.file.close()


EVERYBODYS: queue.SimpleQueue[int] = queue.SimpleQueue()


def filled(made: Any = None) -> Any:
    """A queue of 60 numbers."""
    made = queue.SimpleQueue() if made is None else made
    while not made.empty():
        made.get()
    for i in range(60):
        made.put(i)
    return made


def of_the_program() -> Any:
    filled(EVERYBODYS)
    return DataLoader(OfTheProgram(), 4)


def lines() -> Any:
    with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as file:
        file.write("".join(f"{i}\n" for i in range(60)))
    return DataLoader(Lines(Path(file.name)), 4)


def closed_over() -> Any:
    samples = filled()

    class Local(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            while not samples.empty():
                yield torch.linspace(-1, 1, 8), float(samples.get())

    return DataLoader(Local(), 4)


class Placed(IterableDataset):
    """Keeps its place in a file, as streams do that are to be resumed."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp()) / "place"
        self.path.write_text("0")

    def __iter__(self) -> Iterator[Any]:
        for _ in range(12):
            place = int(self.path.read_text())
            self.path.write_text(str(place + 1))
            yield torch.linspace(-1, 1, 8), float(place)


def once() -> Iterator[Any]:
    """Gives each of its batches once, over all validations."""
    for i in range(40):
        yield torch.linspace(-1, 1, 8).repeat(4, 1), torch.full((4,), float(i))


class Validated(pl.LightningModule):
    """Notes what it is validated on once the training has begun, and counts all its validations."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        self.seen: list[Any] = []
        self.runs, self.steps = 0, [0]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.steps[0] += 1
        if not self.trainer.sanity_checking:
            self.seen.append(batch[1].tolist())
        self.log("val_loss", self(batch[0]).square().mean())

    def on_validation_epoch_end(self) -> None:
        self.runs += 1
        self.seen.append((self.runs, self.steps[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class Counting(pl.Callback):
    def __init__(self) -> None:
        self.batches: list[int] = []

    def on_validation_batch_end(self, *_: Any) -> None:
        self.batches.append(len(self.batches))


def validated(folder: Path, loader: Callable[[], Any], *callbacks: pl.Callback, **options: Any) -> tuple[Any, ...]:
    pl.seed_everything(1, verbose=False)
    model, counting = Validated(), Counting()
    train = DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 8)), 4)
    trainer = make_trainer(folder, *callbacks, counting, max_epochs=2, limit_val_batches=3, **options)
    trainer.fit(model, train, loader())
    return model.seen, counting.batches, float(torch.rand(())), random.random()


LOADERS: dict[str, Callable[[], Any]] = {
    "keeps something": lambda: DataLoader(Samples(), 4),
    "workers": lambda: DataLoader(Samples(), 4, num_workers=1, persistent_workers=True),
    "generator": lambda: DataLoader(Samples(), 4, sampler=RandomSampler(range(12), True, generator=torch.Generator().manual_seed(1))),
    "stream": lambda: DataLoader(Stream(), 4),
    "workers of a stream": lambda: DataLoader(Stream(), 4, num_workers=1),
    "list that is popped": lambda: DataLoader(Popped(list(range(60))), 4),
    "iterator": once,
    "queue": lambda: DataLoader(Popped(filled()), 4),
    "queue of the program": of_the_program,
    "queue of a function": closed_over,
    "open file": lines,
    "place in a file": lambda: DataLoader(Placed(), 4),
}
ONCE = {"iterator", "queue", "queue of the program", "queue of a function", "open file", "place in a file"}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", LOADERS)
def test_validations_are_those_of_the_float_run(name: str, steps: int, tmp_path: Path) -> None:
    cco = quick()
    wanted = validated(tmp_path / "float", LOADERS[name], num_sanity_val_steps=steps)
    assert validated(tmp_path / "cco", LOADERS[name], cco, num_sanity_val_steps=steps) == wanted
    measured = name not in ONCE  # those can't be read again, so the float model is not validated on them
    assert (set(cco.original_metrics) == set(cco.calibrated_metrics) == {"val_loss"}) is measured


def test_an_iterable_that_is_no_loader_of_pytorchs_is_validated_in_the_place_of_the_sanity_check(tmp_path: Path) -> None:
    cco = quick()
    seen, batches, *_ = validated(tmp_path, Batches, cco)
    assert set(cco.original_metrics) == {"val_loss"}
    assert [entry for entry in seen if isinstance(entry, list)] == [[float(i) for i in range(at, at + 4)] for at in (0, 4, 8)] * 2
    assert len(batches) == 9


def test_data_that_give_each_sample_once_are_left_to_the_training_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        validated(tmp_path, LOADERS["queue"], quick())
    assert "not validated before the training: the validation's data may give each sample once" in caplog.text
