"""Around validations, tests and predictions: ranges are frozen in them alone, and another network than the quantized one is named."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning_modules import Classifier, batches, make_trainer, quick
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_cco import CCOWarning


class Small(Classifier):
    """Three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10))


class Breaking(Small):
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if self.trainer.global_step and not self.trainer.sanity_checking:
            raise RuntimeError("the validation breaks")
        super().validation_step(batch, batch_idx)


def _broken(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    with pytest.raises(RuntimeError, match="the validation breaks"):
        trainer.fit(model, batches(), batches(seed=5))


EVALUATIONS: dict[str, Callable[[pl.Trainer, pl.LightningModule], Any]] = {
    "fit": lambda trainer, model: None,
    "validate": lambda trainer, model: trainer.validate(model, batches(), verbose=False),
    "test": lambda trainer, model: trainer.test(model, batches(), verbose=False),
    "predict": lambda trainer, model: trainer.predict(model, batches()),
}


def trained_on(model: pl.LightningModule, images: Tensor) -> None:
    """A loop of one's own, with weights that nearly stay."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        model(images).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("last", [*EVALUATIONS, "interrupted"])
def test_ranges_follow_a_training_after_the_evaluation(last: str, tmp_path: Path) -> None:
    cco = quick()
    model, trainer = Breaking() if last == "interrupted" else Small(), make_trainer(tmp_path, cco)
    if last == "interrupted":
        _broken(trainer, model)
    else:
        trainer.fit(model, batches(), batches(seed=5))
        EVALUATIONS[last](trainer, model)
    assert cco.quantized is not None
    quantizer = next(quantizer for key, quantizer in cco.quantized.activations.items() if str(key).startswith("input"))
    before = float(quantizer.max_val)
    trained_on(model, 20 * next(iter(batches()))[0])
    cco.quantized.update_ranges()
    assert float(quantizer.max_val) > 5 * before


class CopyValidated(Small):
    """An average of its weights that hooks don't see: nobody registers it."""

    def on_fit_start(self) -> None:
        self.average = [copy.deepcopy(self.net)]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", torch.nn.functional.cross_entropy(self.average[0](batch[0]), batch[1]))

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        output: Tensor = self.average[0](batch[0])
        return output


def test_a_validation_of_another_network_is_said_once(tmp_path: Path) -> None:
    model, trainer = CopyValidated(), make_trainer(tmp_path, quick(), max_epochs=2)
    with pytest.warns(CCOWarning, match="the validation called none of the layers that are quantized") as caught:
        trainer.fit(model, batches(), batches(seed=5))
    assert sum("called none of" in str(warning.message) for warning in caught) == 1


class CompiledWhole(Small):
    """Each forward is a compiled graph, whose hooks Python does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.net.compile(backend="eager", dynamic=False)


@pytest.mark.parametrize("make", [Small, CompiledWhole])
def test_a_validation_of_the_module_is_not(make: Callable[[], pl.LightningModule], tmp_path: Path) -> None:
    torch._dynamo.reset()
    model, trainer = make(), make_trainer(tmp_path, quick())
    with warnings.catch_warnings():
        warnings.simplefilter("error", CCOWarning)
        trainer.fit(model, batches(), batches(seed=5))
        trainer.predict(model, batches())


class AverageValidated(Small):
    """An average of its weights among its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.average = AveragedModel(self.net)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("average_loss", torch.nn.functional.cross_entropy(self.average(batch[0]), batch[1]))


def test_a_module_that_only_the_validation_runs_is_named_once(tmp_path: Path) -> None:
    cco = quick()
    with pytest.warns(CCOWarning, match=r"in 'average' \(in 'average\.module\..*EMAWeightAveraging"):
        make_trainer(tmp_path, cco).fit(AverageValidated(), batches(), batches(seed=5))
    assert cco.quantized is not None
    assert len(cco.quantized.drift) == 1  # not one for each of its layers
