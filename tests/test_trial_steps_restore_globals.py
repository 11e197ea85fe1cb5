"""What a user's code keeps outside of its objects (classes, functions, global names, slots) is after the looks of a callback what it is in the float run."""

from __future__ import annotations

import functools
import os
import threading
from array import array
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_modules import make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_cco import CCOCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|no layer is quantized).*")

SKIPPED: dict[str, Any] = {
    "training_settings": {"stats_steps": 3},
    "monitoring_settings": {"draw_graph": False, "sensitivity_batches": 2},
    "layer_settings": [{"match": "*", "skip_quantization": True}],
}
NUMBER = 0
VARIABLE = "LIGHTNING_CCO_TEST_CALLS"
NUMBERS: dict[str, Any] = {"calls": 0, "list": [], "tensor": torch.zeros(1), "once": None}
LOCAL = threading.local()


class InSlots:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class InItsClass:
    calls = 0
    only: Any = None


def by_global_name(_: Any) -> int:
    global NUMBER
    NUMBER += 1
    return NUMBER


def in_a_global_dict(_: Any) -> int:
    NUMBERS["calls"] += 1
    NUMBERS["list"].append(0)
    NUMBERS["tensor"] += 1
    return int(NUMBERS["calls"] + len(NUMBERS["list"]) + NUMBERS["tensor"])


def in_a_class(_: Any) -> int:
    InItsClass.calls += 1
    return InItsClass.calls


def in_a_singleton(_: Any) -> int:
    if InItsClass.only is None:
        InItsClass.only = SimpleNamespace(calls=0)
    InItsClass.only.calls += 1
    return int(InItsClass.only.calls)


def in_the_function(_: Any) -> int:
    in_the_function.calls += 1  # type: ignore[attr-defined]
    return int(in_the_function.calls)  # type: ignore[attr-defined]


def in_a_default(_: Any, kept: Any = []) -> int:  # noqa: B006
    kept.append(0)
    return len(kept)


def in_the_thread(_: Any) -> int:
    LOCAL.calls = getattr(LOCAL, "calls", 0) + 1
    return int(LOCAL.calls)


def in_an_object(owner: Any) -> int:
    owner.slots.calls += 1
    owner.space.calls += 1
    owner.array.append(0)
    owner.bytes.append(0)
    owner.text.write("a")
    owner.objects[0].append(0)
    return int(owner.slots.calls + owner.space.calls + len(owner.array) + len(owner.bytes) + owner.text.tell() + len(owner.objects[0]))


@functools.lru_cache
def kept(_: str) -> list[int]:
    return []


@functools.cache
def kept_for_all() -> InSlots:
    return InSlots()


class InItsCache:
    @functools.cache  # noqa: B019
    def state(self) -> dict[str, int]:
        return {"calls": 0}


IN_ITS_CACHE = InItsCache()


def in_caches(_: Any) -> int:
    kept("a").append(0)
    kept_for_all().calls += 1
    IN_ITS_CACHE.state()["calls"] += 1
    return len(kept("a")) + kept_for_all().calls + IN_ITS_CACHE.state()["calls"]


def in_the_environment(_: Any) -> int:
    os.environ["LIGHTNING_CCO_TEST_CALLS"] = str(int(os.environ.get("LIGHTNING_CCO_TEST_CALLS", "0")) + 1)
    return int(os.environ[VARIABLE])


COUNTERS = (
    by_global_name,
    in_a_global_dict,
    in_a_class,
    in_a_singleton,
    in_the_function,
    in_a_default,
    in_the_thread,
    in_caches,
    in_the_environment,
)


def count() -> int:
    return sum(counter(None) for counter in COUNTERS)


@pytest.fixture(autouse=True)
def _begin() -> None:
    begin()


def begin() -> None:
    global NUMBER
    NUMBER = 0
    NUMBERS.update(calls=0, list=[], tensor=torch.zeros(1))
    InItsClass.calls, InItsClass.only = 0, None
    in_the_function.calls = 0  # type: ignore[attr-defined]
    in_a_default.__defaults__[0].clear()  # type: ignore[index]
    LOCAL.__dict__.clear()
    for cache in (kept, kept_for_all, InItsCache.state):
        cache.cache_clear()
    os.environ.pop(VARIABLE, None)


class Counting(pl.LightningModule):
    """What its step gives follows from how often it was rehearsed."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.slots, self.space, self.array, self.bytes, self.text = InSlots(), SimpleNamespace(calls=0), array("i"), bytearray(), StringIO()
        self.objects = np.array([[], None], dtype=object)
        self.counts: list[Any] = []

    def run(self, x: Tensor) -> Tensor:
        self.counts.append([counter(self) for counter in (*COUNTERS, in_an_object)])
        return self.net(x) * (1 + 0.01 * self.counts[-1][0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.run(batch[0]), batch[1] % 4)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self.run(batch[0]), batch[1] % 4))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.counts.append([batch[0].sum().item(), batch[1].tolist()])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class CountingForward(Counting):
    """It is the forward that counts."""

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1] % 4)


class Samples(Dataset):
    def __init__(self, counts: bool = False) -> None:
        self.counts = counts

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.linspace(-1, 1, 8) * (i / 24), i + 4 * (count() if self.counts else 0)


def trained(folder: Path, make: Callable[[], Counting], loaders: Callable[[], dict[str, Any]], cco: CCOCallback | None) -> Any:
    pl.seed_everything(1, verbose=False)
    begin()
    model = make()
    make_trainer(folder, *([cco] if cco else []), max_epochs=2).fit(model, **loaders())
    return [model.counts, *(parameter.tolist() for parameter in model.parameters())]


def plain_loaders() -> dict[str, Any]:
    return {"train_dataloaders": DataLoader(Samples(), 4, shuffle=True), "val_dataloaders": DataLoader(Samples(), 8)}


@pytest.mark.parametrize("make", [Counting, CountingForward])
def test_a_network_trains_as_in_float(make: Callable[[], Counting], tmp_path: Path) -> None:
    expected = trained(tmp_path, make, plain_loaders, None)
    assert trained(tmp_path, make, plain_loaders, CCOCallback(SKIPPED)) == expected


def counting_collate(items: list[Any]) -> Any:
    x, y = default_collate(items)
    return x, y + 4 * count()


@pytest.mark.parametrize("where", ["dataset", "collate"])
def test_a_loader_gives_what_it_gives_in_float(where: str, tmp_path: Path) -> None:
    def loaders() -> dict[str, Any]:
        collate = counting_collate if where == "collate" else None
        train, val = (DataLoader(Samples(where == "dataset"), size, shuffle=size == 4, collate_fn=collate) for size in (4, 8))
        return {"train_dataloaders": train, "val_dataloaders": val}

    expected = trained(tmp_path, Counting, loaders, None)
    assert trained(tmp_path, Counting, loaders, CCOCallback(SKIPPED)) == expected


class Transferring(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.transferred = 0

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.transferred += 1
        return [batch[0] * (1 + 0.01 * self.transferred) + torch.rand(()), batch[1]]


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.transferred = 0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Samples(), 4, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Samples(), 8)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.transferred += 1
        return [batch[0] * (1 + 0.01 * self.transferred), batch[1]]


@pytest.mark.parametrize("owner", ["module", "data module"])
def test_hooks_on_the_way_to_the_device_count_as_in_float(owner: str, tmp_path: Path) -> None:
    make = Transferring if owner == "module" else Counting

    def loaders() -> dict[str, Any]:
        return plain_loaders() if owner == "module" else {"datamodule": Data()}

    expected = trained(tmp_path, make, loaders, None)
    assert trained(tmp_path, make, loaders, CCOCallback(SKIPPED)) == expected
