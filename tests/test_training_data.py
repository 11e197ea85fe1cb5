"""Whatever form the data take: several loaders, no length, a last batch that is smaller, other sizes and lengths."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from lightning_modules import Classifier, assert_acts, assert_quantized, batches, make_trainer, quick, run_fit
from models import ResidualCNN, TokenModel
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_cco import CCOError


class OfSeveral(Classifier):
    """Takes what several loaders give at a time: a mapping of batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            batch = batch["a"] if batch["a"] is not None else batch["b"]
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", self._loss(batch))


@pytest.mark.parametrize(("mode", "steps"), [("max_size_cycle", 4), ("min_size", 2), ("max_size", 4)])
def test_several_training_loaders_at_a_time(mode: Any, steps: int, tmp_path: Path) -> None:
    short = DataLoader(Subset(batches().dataset, range(16)), 8)
    loaders = CombinedLoader({"a": short, "b": batches()}, mode)
    run = run_fit(tmp_path, OfSeveral, train=loaders)
    assert len(run.losses) == steps
    assert_quantized(run)


def test_several_loaders_for_validation(tmp_path: Path) -> None:
    run = run_fit(tmp_path, OfSeveral, val=[batches(seed=5), batches(seed=6)])
    assert_quantized(run)
    assert set(run.cco.original_metrics) == {"val/dataloader_idx_0", "val/dataloader_idx_1"}
    quantized = {name for name in run.trainer.callback_metrics if name.startswith("val/")}
    assert quantized == set(run.cco.original_metrics)


class Stream(IterableDataset):
    """Has no length."""

    def __iter__(self) -> Iterator[Any]:
        yield from batches().dataset


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 2}, {"max_steps": 3}], ids=["whole", "limited", "max_steps"])
def test_a_stream_without_length(options: dict[str, Any], tmp_path: Path) -> None:
    run = run_fit(tmp_path, Classifier, train=DataLoader(Stream(), 8), val=batches(), **options)
    assert len(run.losses) == min(options.values(), default=4)
    assert_quantized(run)


def test_capture_and_calibration_take_nothing_from_the_training(tmp_path: Path) -> None:
    """The order of the training batches is that of a run without the callback."""

    class Order(pl.Callback):
        def __init__(self) -> None:
            self.sums: list[float] = []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            self.sums.append(float(batch[0].sum()))

    run_fit(tmp_path, Classifier, order := Order(), train=batches(shuffle=True))
    pl.seed_everything(1, verbose=False)
    make_trainer(tmp_path, plain := Order()).fit(Classifier(), batches(shuffle=True))
    assert len(order.sums) == 4
    assert order.sums == plain.sums


@pytest.mark.parametrize("left", [1, 5])
def test_a_last_batch_that_is_smaller(left: int, tmp_path: Path) -> None:
    # One sample is enough for the batch norms: they average over the pixels too.
    train = DataLoader(Subset(batches().dataset, range(16 + left)), 8)
    run = run_fit(tmp_path, Classifier, train=train, val=train)
    assert len(run.losses) == 3
    assert_quantized(run)
    assert_acts(run.cco, torch.randn(3, 1, 8, 8))


def test_changing_image_sizes(tmp_path: Path) -> None:
    images = [torch.randn(4, 1, size, size + 2) for size in (8, 12, 6, 16)]
    train = DataLoader([(x, torch.arange(4)) for x in images], batch_size=None)
    run = run_fit(tmp_path, Classifier, train=train, val=train)
    assert_quantized(run, images[3])
    assert {layer.kind for layer in run.cco.quantized.graph} >= {"conv", "linear"}


class Tokens(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = TokenModel()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch).flatten(0, 1), batch.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_changing_sequence_lengths(tmp_path: Path) -> None:
    train = DataLoader([torch.randint(0, 20, (size, length)) for size, length in ((4, 6), (2, 12), (3, 1), (4, 9))], batch_size=None)
    run = run_fit(tmp_path, Tokens, train=train)
    assert_quantized(run, torch.randint(0, 20, (2, 3)))


@pytest.mark.parametrize("inference_mode", [True, False])
def test_inference_mode(inference_mode: bool, tmp_path: Path) -> None:
    run = run_fit(tmp_path, Classifier, val=batches(), inference_mode=inference_mode)
    results = [run.trainer.validate(run.model, batches(), verbose=False)[0]["val_loss"] for _ in range(2)]
    assert results[0] == results[1]
    with run.cco.quantized.disabled():
        assert run.trainer.validate(run.model, batches(), verbose=False)[0]["val_loss"] != results[0]
    # Nothing that was made in inference mode is left to break a later training.
    make_trainer(tmp_path, run.cco, max_epochs=1, inference_mode=inference_mode).fit(run.model, batches(), batches())
    assert not any(t.is_inference() for q in run.cco.quantized.activations.values() for t in q.buffers())
    assert_acts(run.cco)


def test_copies_and_pickles_of_the_trained_module_are_plain_and_leave_the_hooks_alone(tmp_path: Path) -> None:
    run = run_fit(tmp_path, Classifier)
    run.model.trainer = None
    x = batches().dataset.tensors[0]
    run.model.eval()
    with torch.no_grad():
        quantized = run.model(x)
        with run.cco.quantized.disabled():
            plain = run.model(x)
        for twin in (copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))):
            assert torch.equal(twin(x), plain)
            assert list(twin.state_dict()) == list(Classifier().state_dict())
        assert torch.equal(run.model(x), quantized)
    # A copy can be compressed like any other model.
    again = run_fit(tmp_path, lambda: copy.deepcopy(run.model).train())
    assert_quantized(again)
    assert again.model is not run.model


def test_state_dict_has_the_plain_names_while_training(tmp_path: Path) -> None:
    names = []

    class Watched(Classifier):
        def on_train_batch_end(self, *args: Any) -> None:
            names.append((list(self.state_dict()), [name for name, _ in self.named_modules()]))

    run = run_fit(tmp_path, Watched)
    plain = Watched()
    assert names == [(list(plain.state_dict()), [name for name, _ in plain.named_modules()])] * 4
    ResidualCNN().load_state_dict(run.model.net.state_dict(), strict=True)


def test_without_a_logger_everything_is_written_below_the_default_root(tmp_path: Path) -> None:
    run = run_fit(tmp_path, Classifier, logger=False)
    assert run.trainer.loggers == []
    assert (tmp_path / "cco" / "sensitivity.csv").is_file()


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("loader", ["iterator", "dataset"])
def test_a_stream_that_the_validation_has_emptied_is_told(loader: str, tmp_path: Path) -> None:
    """In a float run the training ends at once, without a word."""

    class Once(IterableDataset):
        def __init__(self) -> None:
            self.samples = iter(batches().dataset)

        def __iter__(self) -> Iterator[Any]:
            return self.samples

    data = Once()
    train = iter(batches()) if loader == "iterator" else DataLoader(data, 8)
    trainer = make_trainer(tmp_path, quick(), num_sanity_val_steps=-1)
    with pytest.raises(CCOError, match=r"The validation reads from the same object, a \w+, which gives each sample once"):
        trainer.fit(Classifier(), train, train if loader == "iterator" else DataLoader(data, 8))
    with pytest.raises(CCOError, match=r"to calibrate on\.$"):
        make_trainer(tmp_path, quick()).fit(Classifier(), iter([]))
