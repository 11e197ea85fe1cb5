"""What is run to capture, to calibrate and to measure is no step of the training: whatever a forward or a step writes to is as in the float run."""

from __future__ import annotations

import copy
import random
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from lightning_modules import make_trainer, quick
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cco import CCOCallback, quantize


class Meter:
    """A running mean, as many projects have one."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1


class Writing(pl.LightningModule):
    """Keeps everything that a step can keep; its weights stay, so that values are those of the float run."""

    def __init__(self, average: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.average = average
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(4, 32))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.register_buffer("center", torch.zeros(4))
        self.steps, self.outputs, self.meter, self.window, self.lists = 0, [], Meter(), deque(maxlen=50), defaultdict(list)
        self.array, self.own, self.python = np.zeros(2), np.random.default_rng(0), random.Random(0)
        self.generator, self.memory = torch.Generator().manual_seed(1), {"mean": torch.zeros(4)}
        self.epochs: list[Any] = []
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        self.encoder[0].register_forward_hook(count)
        self.calls = lambda: calls

    def note(self, value: Tensor) -> None:
        self.steps += 1
        self.outputs.append(value.detach())
        self.meter.update(1.0)
        self.window.append(self.python.random() + float(self.own.random()) + float(torch.rand((), generator=self.generator)))
        self.lists["all"].append(self.steps)
        self.array += 1
        self.memory["mean"] = self.memory["mean"] + 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        with torch.no_grad():
            for kept, now in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
                self.average(kept, now * 1.1)
            wanted = self.teacher(x)
            at = int(self.pointer)
            self.queue[:, at : at + len(x)] = wanted.T
            self.pointer[0] = (at + len(x)) % 32
            self.center = self.center * 0.9 + wanted.mean(0) * 0.1
        loss = F.mse_loss(self.encoder(x), wanted - self.center)
        self.note(loss)
        if self.logger is not None:
            self.logger.log_metrics({"own": float(self.steps)}, self.steps)
        return loss

    def on_train_epoch_end(self) -> None:
        kept = [self.steps, len(self.outputs), self.meter.count, list(self.window), self.lists["all"][:], self.array.tolist(), self.calls()]
        tensors = [self.queue, self.pointer, self.center, self.memory["mean"], *self.teacher.parameters()]
        self.epochs.append([*kept, *(tensor.tolist() for tensor in tensors)])
        self.outputs.clear()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.encoder.parameters(), 0.0)


class WithForward(Writing):
    def forward(self, x: Tensor) -> Tensor:
        result = self.encoder(x)
        self.note(result)
        self.log("seen", result.mean())
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()


AVERAGES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "in place": lambda kept, now: kept.mul_(0.9).add_(now, alpha=0.1),
    "of its data": lambda kept, now: kept.data.mul_(0.9).add_(now.data, alpha=0.1),
    "new data": lambda kept, now: setattr(kept, "data", kept.data * 0.9 + now.data * 0.1),
    "copied": lambda kept, now: kept.copy_(kept * 0.9 + now * 0.1),
    "lists": lambda kept, now: torch._foreach_lerp_([kept], [now], 0.1),
}


def epochs(folder: Path, make: Callable[[], Writing], cco: CCOCallback | None) -> tuple[list[Any], str]:
    pl.seed_everything(1, verbose=False)
    model, x = make(), torch.randn(24, 8, generator=torch.Generator().manual_seed(2))
    logger = CSVLogger(folder, name="log")
    make_trainer(folder, *([cco] if cco else []), max_epochs=3, logger=logger, log_every_n_steps=1).fit(
        model, DataLoader(TensorDataset(x), 4)
    )
    table = Path(logger.log_dir, "metrics.csv")
    rows = table.read_text().splitlines() if table.exists() else [""]
    own = rows[0].split(",").index("own") if "own" in rows[0].split(",") else None
    return model.epochs, "" if own is None else " ".join(value for row in rows[1:] if (value := row.split(",")[own]))


@pytest.mark.filterwarnings("ignore:.*many workers.*")
@pytest.mark.parametrize("average", AVERAGES)
def test_a_step_that_is_rehearsed_leaves_nothing(average: str, tmp_path: Path) -> None:
    cco = quick(training_settings={"stats_steps": 5})
    wanted = epochs(tmp_path / "float", lambda: Writing(AVERAGES[average]), None)
    assert epochs(tmp_path / "cco", lambda: Writing(AVERAGES[average]), cco) == wanted
    assert cco.quantized is not None
    assert {layer.path for layer in cco.quantized.graph if layer.weighted} >= {"encoder.0", "encoder.2"}
    assert not any(layer.path.startswith("teacher") for layer in cco.quantized.graph if layer.name in cco.quantized.plan.quantized)


@pytest.mark.filterwarnings("ignore:.*many workers.*")
@pytest.mark.parametrize("given", [False, True], ids=["forward", "forward_fn"])
def test_a_forward_that_is_looked_at_leaves_nothing(given: bool, tmp_path: Path) -> None:
    def make() -> Writing:
        return WithForward(AVERAGES["in place"])

    cco = CCOCallback(
        {"training_settings": {"stats_steps": 5}, "monitoring_settings": {"draw_graph": False}},
        forward_fn=(lambda module, batch: module.training_step(batch, 0)) if given else None,
    )
    assert epochs(tmp_path / "cco", make, cco) == epochs(tmp_path / "float", make, None)


class Drawing(Writing):
    """Takes a second batch from an iterator of its own, as semi-supervised steps do."""

    def __init__(self, begin: Callable[[], Any]) -> None:
        super().__init__(AVERAGES["in place"])
        self.begin, self.drawn = begin, []

    def on_fit_start(self) -> None:
        self.unlabelled = self.begin()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        try:
            more = next(self.unlabelled)
        except StopIteration:
            self.unlabelled = self.begin()
            more = next(self.unlabelled)
        self.drawn.append(more[0].sum().item())
        more[0].mul_(0)  # whoever kept it sees that
        return self.encoder(batch[0]).square().mean()

    def on_train_epoch_end(self) -> None:
        self.epochs.append(list(self.drawn))


def _stream() -> Any:
    for i in range(100):
        yield [torch.full((2,), float(i))]


OWN: dict[str, Callable[[], Any]] = {
    "generator": _stream,
    "iterator of a list": lambda: iter([[torch.full((2,), float(i))] for i in range(5)]),
    "iterator of a loader": lambda: iter(DataLoader(TensorDataset(torch.arange(40.0)), 2)),
}


@pytest.mark.filterwarnings("ignore:.*many workers.*")
@pytest.mark.parametrize("begin", OWN)
def test_what_a_step_draws_when_it_is_rehearsed_comes_again(begin: str, tmp_path: Path) -> None:
    wanted = epochs(tmp_path / "float", lambda: Drawing(OWN[begin]), None)
    cco = quick(training_settings={"stats_steps": 5})
    assert epochs(tmp_path / "cco", lambda: Drawing(OWN[begin]), cco) == wanted
    assert len(wanted[0][-1]) == 18


class Caching(nn.Module):
    """Makes something once, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.weight = nn.Linear(8, 8), nn.Linear(8, 4), nn.Parameter(torch.randn(8, 8))
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.einsum("i,j->ij", torch.ones(1), torch.arange(8.0)).cos()
        return self.last(F.relu(torch.einsum("bi,ij->bj", F.relu(self.first(x)) * self.cache, self.weight)))


def test_what_a_model_makes_once_is_no_layer_of_the_graph() -> None:
    model, x = Caching(), torch.randn(6, 8)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    model(x).sum().backward()
    assert [layer.kind for layer in quantized.graph].count("einsum") == 1
    assert quantized.drift == []


class Remembering(nn.Module):
    """Goes on from its last state, as recurrent networks for streams and Transformer-XL do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.input, self.hidden, self.output, self.how = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), how
        if how == "buffer":
            self.register_buffer("state", torch.zeros(6, 8))
        else:
            self.state = None if how == "nothing" else [torch.zeros(6, 8)] if how == "list" else torch.zeros(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        state = self.state[0] if isinstance(self.state, list) else self.state
        new = torch.tanh(self.input(x) + self.hidden(torch.zeros(6, 8) if state is None else state))
        if isinstance(self.state, list):
            self.state[0] = new.detach()
        elif self.how == "in place":
            self.state.copy_(new.detach())
        else:
            self.state = new.detach()
        return self.output(new)


@pytest.mark.parametrize("how", ["buffer", "nothing", "list", "attribute", "in place"])
def test_a_state_that_a_forward_writes_is_a_value(how: str) -> None:
    torch.manual_seed(0)
    model, x = Remembering(how), torch.randn(6, 8)
    before = copy.deepcopy(model.state)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x, x])
    assert str(model.state) == str(before)
    assert {"input", "hidden"} <= {layer.path for layer in quantized.graph if layer.name in quantized.plan.quantized}
    with torch.no_grad():
        rounded = [model(x) for _ in range(3)][-1]
        model.state = before
        with quantized.disabled():
            exact = [model(x) for _ in range(3)][-1]
    assert 25 < 10 * torch.log10(exact.var() / (exact - rounded).square().mean()) < 70
    assert quantized.drift == []


class Streaming(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Remembering("nothing")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.filterwarnings("ignore:.*many workers.*")
def test_a_state_that_a_step_carries_is_a_value(tmp_path: Path) -> None:
    cco, model = quick(), Streaming()
    make_trainer(tmp_path, cco).fit(model, DataLoader(TensorDataset(torch.randn(24, 8)), 6))
    assert cco.quantized is not None
    assert {"net.input", "net.hidden"} <= {layer.path for layer in cco.quantized.graph if layer.name in cco.quantized.plan.quantized}
    assert cco.quantized.drift == []
