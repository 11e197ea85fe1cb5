"""Data that hooks change while the training runs (levels, switches, sizes) are those of the float run; where they can't be, a warning names them."""

from __future__ import annotations

import multiprocessing
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning_modules import make_trainer, quick
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_cco import CCOCallback, CCOWarning

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|use of fork|max_epochs).*")
Item = tuple[Tensor, int, int]
X = torch.linspace(-1, 1, 8)
OF_THE_MODULE = {"level": 0}


class Levels(IterableDataset[Item]):
    """A curriculum: what it gives depends on a level at the time that it is asked."""

    in_class = 0

    def __init__(self) -> None:
        self.level, self.inner = 0, {"transform": [Transform()]}

    def __iter__(self) -> Iterator[Item]:
        for i in range(24):
            yield X * (self.level + 1), i, self.level + self.inner["transform"][0].level + self.in_class + OF_THE_MODULE["level"]


class Transform:
    level = 0


class Once(Levels):
    def __init__(self) -> None:
        super().__init__()
        self.left = iter(range(72))

    def __iter__(self) -> Iterator[Item]:
        for x, _, level in super().__iter__():
            yield x, next(self.left), level


class Placed(Levels):
    """Keeps its place in a file, as streams do that are to be resumed."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp()) / "place"
        self.path.write_text("0")

    def __iter__(self) -> Iterator[Item]:
        for x, _, level in super().__iter__():
            place = int(self.path.read_text())
            self.path.write_text(str(place + 1))
            yield x, place, level


class OfAService(Levels):
    """Its code may take samples away for good."""

    def __iter__(self) -> Iterator[Item]:
        assert socket.AF_INET
        yield from super().__iter__()


class Indexed(Dataset[Item]):
    level = 0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Item:
        return X * (self.level + 1), i, self.level


class Shared(Levels):
    """Its worker processes see what hooks change."""

    def __init__(self) -> None:
        super().__init__()
        self.level = multiprocessing.Value("i", 0)  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Item]:
        for i in range(24):
            yield X, i, self.level.value  # type: ignore[attr-defined]


class OfTheRun(IterableDataset[Item]):
    """A stream that reads a number of the module that is trained, or of its Trainer."""

    def __init__(self) -> None:
        self.left = iter(range(72))
        self.module: Any = None

    def __iter__(self) -> Iterator[Item]:
        for _ in range(24):
            yield X, next(self.left), self.number()

    def number(self) -> int:
        raise NotImplementedError


class OfItsAttribute(OfTheRun):
    def number(self) -> int:
        return int(self.module.level)


class OfItsBuffer(OfTheRun):
    def number(self) -> int:
        return int(self.module.stage)


class OfItsConfig(OfTheRun):
    def number(self) -> int:
        return int(self.module.hparams["level"])


class OfItsStep(OfTheRun):
    def number(self) -> int:
        return int(self.module.global_step)


class OfNothing(OfTheRun):
    def number(self) -> int:
        return len(list(self.module.parameters()))


class Reading(pl.LightningModule):
    """Notes what it is trained on; changes its data by ``change`` before an epoch and before a batch."""

    def __init__(self, change: Callable[[Any, int], None], loader: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        self.change, self.loader, self.seen = change, loader, list[Any]()
        self.level = 0
        self.register_buffer("stage", torch.tensor(0))
        self.save_hyperparameters({"level": 0})
        if isinstance(loader.dataset, OfTheRun):
            loader.dataset.module = self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append([self.current_epoch, *(value.tolist() for value in batch)])
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def on_train_epoch_start(self) -> None:
        self.change(self.loader, 5 + self.current_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.change(self.loader, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def seen(folder: Path, loader: Any, change: Callable[[Any, int], None], cco: CCOCallback | None) -> list[Any]:
    pl.seed_everything(1, verbose=False)
    OF_THE_MODULE["level"] = Levels.in_class = 0
    module = Reading(change, loader)
    make_trainer(folder, *([cco] if cco else []), max_epochs=2).fit(module, loader)
    return module.seen


def callback(steps: int = 4) -> CCOCallback:
    return quick(training_settings={"stats_steps": steps}, monitoring_settings={"draw_graph": False, "sensitivity_batches": 1})


def attribute(loader: Any, value: int) -> None:
    loader.dataset.level = value


def transform(loader: Any, value: int) -> None:
    loader.dataset.inner["transform"][0].level = value


def of_the_class(loader: Any, value: int) -> None:
    Levels.in_class = value


def of_the_module(loader: Any, value: int) -> None:
    OF_THE_MODULE["level"] = value


def batch_size(loader: Any, value: int) -> None:
    loader.batch_sampler.batch_size = 4 + value % 3


def shared(loader: Any, value: int) -> None:
    loader.dataset.level.value = value


def of_the_network(loader: Any, value: int) -> None:
    module = loader.dataset.module
    module.level = module.hparams["level"] = value
    module.stage.fill_(value)


def nothing(loader: Any, value: int) -> None:
    pass


@pytest.mark.parametrize(
    ("data", "change"),
    [
        (Indexed, attribute),
        (Indexed, batch_size),
    ],
)
def test_data_of_this_process_are_those_of_the_float_run(data: type[Any], change: Callable[[Any, int], None], tmp_path: Path) -> None:
    wanted = seen(tmp_path / "float", DataLoader(data(), 4), change, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CCOWarning)
        assert seen(tmp_path / "cco", DataLoader(data(), 4), change, callback()) == wanted


@pytest.mark.parametrize(
    ("make", "change", "name"),
    [
        (lambda: DataLoader(Levels(), 4), attribute, r"dataset\.level \(from 0 to 5\)"),
        (lambda: DataLoader(Levels(), 4), of_the_module, r"OF_THE_MODULE"),
        (lambda: DataLoader(Levels(), 4), batch_size, r"batch_sampler\.batch_size \(from 4 to 6\)"),
        (lambda: DataLoader(Once(), 4), attribute, r"dataset\.level \(from 0 to 5\)"),
        (lambda: DataLoader(OfAService(), 4), attribute, r"dataset\.level"),
        (lambda: DataLoader(Once(), 4), transform, r"dataset\.inner\['transform'\]\[0\]\.level"),
        (lambda: DataLoader(Once(), 4), of_the_class, r"dataset\.in_class"),
        (lambda: DataLoader(Indexed(), 4, num_workers=1), batch_size, r"batch_sampler\.batch_size \(from 4 to 6\)"),
        (lambda: DataLoader(Shared(), 4, num_workers=1), shared, r"dataset\.level \(from 0 to 5\)"),
        (lambda: DataLoader(OfItsAttribute(), 4), of_the_network, r"dataset\.module\.level \(from 0 to 5\)"),
        (lambda: DataLoader(OfItsBuffer(), 4), of_the_network, r"dataset\.module\.stage \(from 0 to 5\)"),
        (lambda: DataLoader(OfItsConfig(), 4), of_the_network, r"dataset\.module\.hparams\['level'\] \(from 0 to 5\)"),
        (lambda: DataLoader(OfItsStep(), 4), nothing, r"dataset\.module\.global_step \(from 0 to 1\)"),
    ],
    ids=[
        "stream",
        "module",
        "batch size of a stream",
        "attribute",
        "service",
        "transform",
        "class",
        "batch size",
        "shared memory",
        "attribute of the network",
        "buffer",
        "configuration",
        "step",
    ],
)
def test_changes_after_batches_were_drawn_are_said_by_name(
    make: Callable[[], Any], change: Callable[[Any, int], None], name: str, tmp_path: Path
) -> None:
    with pytest.warns(CCOWarning, match=name) as caught:
        got = seen(tmp_path / "cco", make(), change, callback())
    assert sum("before their time" in str(warning.message) for warning in caught) == 1
    if change is not batch_size:
        assert [ids for _, _, ids, _ in got] == [ids for _, _, ids, _ in seen(tmp_path / "float", make(), change, None)]


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: DataLoader(Once(), 4), nothing),
        (lambda: DataLoader(Placed(), 4), nothing),
        (lambda: DataLoader(OfNothing(), 4), of_the_network),
        (lambda: DataLoader(Indexed(), 4, shuffle=True, num_workers=1), nothing),
        (lambda: DataLoader(Indexed(), 4, num_workers=1), attribute),  # a copy in the worker keeps its level
    ],
    ids=["stream", "place in a file", "a network that is not read", "workers", "not seen by workers"],
)
def test_nothing_is_said_where_nothing_changes(make: Callable[[], Any], change: Callable[[Any, int], None], tmp_path: Path) -> None:
    wanted = seen(tmp_path / "float", make(), change, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CCOWarning)
        assert seen(tmp_path / "cco", make(), change, callback()) == wanted
