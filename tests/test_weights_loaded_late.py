"""Weights that are loaded between the calibration and the first batch: ranges, metrics and teacher would be those of others, without a word."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning_modules import make_trainer, quick
from test_distillation import data
from test_distillation_runs import plain
from torch.utils.data import DataLoader
from weight_averages import averaging

from lightning_cco import CCOWarning

LATE = ["on_train_start", "on_train_epoch_start"]
IN_TIME = ["setup", "configure_model", "on_fit_start", "configure_optimizers"]


def batches() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=None)  # type: ignore[arg-type]


def loading(hook: str, weights: dict[str, Any]) -> pl.LightningModule:
    """A module that loads weights in one of its hooks, once."""
    torch.manual_seed(0)
    module = plain()
    own: Callable[..., Any] = getattr(module, hook)
    loaded: list[bool] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        if not loaded:
            loaded.append(True)
            module.load_state_dict(weights)
        return own(*args, **kwargs)

    setattr(module, hook, load)
    return module


@pytest.mark.parametrize("hook", LATE + IN_TIME)
def test_weights_of_a_hook(hook: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights = copy.deepcopy(plain().state_dict())
    module, cco = loading(hook, weights), quick(distillation_settings={"weight": 0.5})
    trainer = make_trainer(tmp_path, cco)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, batches())
    said = [str(warning.message) for warning in caught if isinstance(warning.message, CCOWarning) and "first batch" in str(warning.message)]
    taught = cco.distiller.teacher.state_dict()
    right = all(torch.equal(taught[name], value) for name, value in weights.items())
    assert right is (hook in IN_TIME)  # what is warned of
    assert len(said) == (hook in LATE)
    assert all(re.search(r"net\..*weight.*Load weights in setup", text) for text in said)


@pytest.mark.parametrize(
    "other", [lambda: averaging("WeightAveraging"), lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1)], ids=["average", "swa"]
)
def test_callbacks_that_average_weights_change_none(other: Callable[[], pl.Callback], tmp_path: Path) -> None:
    cco = quick()
    trainer = make_trainer(tmp_path, cco, other(), max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the first batch, such as")
        trainer.fit(plain(), batches(), batches())
        make_trainer(tmp_path, cco).fit(plain(), batches())
