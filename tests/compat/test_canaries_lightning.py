"""Each private API of Lightning is there, and does what we take it to do."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from canary import tries
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_cco.compat import (
    callers,
    lightning_loaders,
    lightning_trainer,
)


class Small(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.moved, self.loaders = nn.Linear(2, 1), 0, 0

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, index: int, dataloader_idx: int = 0) -> None:
        self.log("score", batch.mean())

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.moved += 1
        return batch

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.parameters(), lr=0.1)]

    def train_dataloader(self) -> DataLoader:
        self.loaders += 1
        return DataLoader(torch.arange(8.0).view(4, 2), batch_size=2)

    def val_dataloader(self) -> list[DataLoader]:
        return [DataLoader(torch.ones(2, 2)), DataLoader(torch.zeros(2, 2))]


class Looks(pl.Callback):
    """Looks at the Trainer while it runs."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}
        self.sanity_checks = 0

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.sanity_checks += 1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            results = lightning_trainer.running_results(trainer)
            results.dataloader_idx = 1
            self.seen["running"] = set(results.metrics(on_step=False)["callback"])
            results.dataloader_idx = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fetcher, loader = lightning_loaders.training_fetcher(trainer), lightning_loaders.training_loader(trainer)
        self.seen["loader"] = lightning_loaders.loader_of(fetcher) is loader and fetcher.combined_loader is loader
        self.seen["mode"] = lightning_loaders.mode_of(loader)
        lightning_loaders.set_loader_of(fetcher, [("batch", 0, 0)])
        self.seen["begun"] = list(iter(fetcher.combined_loader))
        lightning_loaders.set_loader_of(fetcher, loader)
        with lightning_trainer.validation_loader_replaced(trainer, lambda combined: combined) as replaced:
            lightning_trainer.sanity_check(trainer, progress_has_begun=False)
        self.seen["replaced"] = replaced, self.sanity_checks
        before, pl_module.moved = pl_module.moved, 0
        self.seen["batch"] = lightning_trainer.batch_to_device(trainer, torch.ones(2)).tolist(), pl_module.moved
        pl_module.moved = before

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen["due"] = trainer.fit_loop._should_reload_train_dl

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen["step"] = lightning_trainer.logged_step(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen["logged"] = {result.meta.name for result in lightning_trainer.logged_results(trainer)}


@tries(
    "lightning.pytorch.LightningModule._on_before_batch_transfer",
    "lightning.pytorch.trainer.call._call_strategy_hook",
    "lightning.pytorch.Trainer._results",
    "lightning.pytorch.Trainer._run_sanity_check",
    "lightning.pytorch.loops._TrainingEpochLoop._batches_that_stepped",
    "lightning.pytorch.loops._EvaluationLoop._combined_loader",
    "lightning.pytorch.loops._EvaluationLoop._data_fetcher",
    "lightning.pytorch.loops._FitLoop._results",
    "lightning.pytorch.loops.fetchers._DataFetcher._combined_loader",
    "lightning.pytorch.loops._FitLoop._data_fetcher",
    "lightning.pytorch.loops._FitLoop._combined_loader",
    "lightning.pytorch.loops._FitLoop._should_reload_train_dl",
    "lightning.pytorch.utilities.combined_loader.CombinedLoader._mode",
)
def test_a_fit(tmp_path: Path) -> None:
    looks, module = Looks(), Small()
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=2,
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[looks],
    )
    trainer.fit(module)
    assert looks.seen["loader"]
    assert looks.seen["mode"] == "max_size_cycle"
    assert looks.seen["replaced"] == (True, 2)
    assert looks.seen["begun"] == [("batch", 0, 0)]
    assert looks.seen["batch"] == ([1.0, 1.0], 1)
    assert looks.seen["running"] == {"score/dataloader_idx_1"}
    assert looks.seen["logged"] >= {"loss", "score"}
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert looks.seen["step"] == max(int(row["step"]) for row in csv.DictReader(file) if row["score/dataloader_idx_1"])
    assert looks.seen["due"] is False  # it was, before this epoch
    assert module.loaders == 2


@tries("lightning.pytorch.loops._FitLoop._should_reload_train_dl")
def test_loaders_are_made_anew_where_the_training_would() -> None:
    class Due:
        _should_reload_train_dl = True
        made = 0

        def setup_data(self) -> None:
            self.made += 1

    trainer: Any = type("Trainer", (), {"fit_loop": Due()})()
    lightning_loaders.reload_if_due(trainer)
    assert trainer.fit_loop.made == 1


@tries("lightning.pytorch.core.optimizer._init_optimizers_and_lr_schedulers")
def test_optimizers(tmp_path: Path) -> None:
    module = Small()
    module.trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    assert [type(optimizer) for optimizer in lightning_trainer.configured_optimizers(module)] == [torch.optim.SGD]


@tries("lightning.pytorch.strategies.strategy._ForwardRedirection.wrapped_forward")
def test_a_redirected_forward() -> None:
    module = Small()
    seen: list[str] = []
    wrapper = nn.Module()
    wrapper.forward = lambda *args: seen.append(module.__dict__["forward"].__name__) or module(*args)
    module.log = lambda *args: None
    _ForwardRedirection()(wrapper, module, "validation_step", torch.ones(1), 0)
    assert seen == [callers.REDIRECTED_FORWARD]


class WithState(DataLoader):
    def state_dict(self) -> dict[str, Any]:
        return {"place": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None


@tries(
    "lightning.fabric.utilities.types._Stateful",
    "lightning.fabric.utilities.data._set_sampler_epoch",
    "lightning.pytorch.utilities.combined_loader.CombinedLoader._state_dicts",
    "torch.utils.data.DataLoader._get_iterator",
    "torch.utils.data.DataLoader._iterator",
)
def test_loaders() -> None:
    loader = WithState(torch.ones(4, 2))
    assert isinstance(loader, lightning_loaders.Stateful)
    assert not isinstance(DataLoader(torch.ones(4, 2)), lightning_loaders.Stateful)
    combined = CombinedLoader([loader])
    lightning_loaders.replace_loader_states(combined, lambda: [{"place": 1}])
    assert combined._state_dicts() == [{"place": 1}]
    assert lightning_loaders.loader_states(combined) == [{"place": 3}]
    lightning_loaders.replace_loader_states(combined, None)
    assert combined._state_dicts() == [{"place": 3}]

    sampler = DistributedSampler(torch.ones(4), num_replicas=1, rank=0)
    lightning_loaders.set_sampler_epoch(DataLoader(torch.ones(4), sampler=sampler), 5)
    assert sampler.epoch == 5

    assert lightning_loaders.is_plain_loader(loader)
    assert not lightning_loaders.is_plain_loader([1, 2])
    assert not lightning_loaders.is_plain_loader(type("Own", (DataLoader,), {"_get_iterator": lambda self: iter(())})(torch.ones(2)))
    with_workers = DataLoader(torch.ones(4), num_workers=1, persistent_workers=True)
    assert vars(with_workers).items() >= lightning_loaders.NOT_BEGUN.items()
    combined = CombinedLoader([with_workers])
    iter(combined)
    assert vars(with_workers)["_iterator"] is not None
    combined.reset()
