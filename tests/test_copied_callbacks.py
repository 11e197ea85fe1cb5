"""A copy or a pickle of a callback holds what a checkpoint of its run would; the hooks stay on the module of that run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_modules import Classifier, batches, make_trainer, quick
from torch.utils.data import DataLoader, TensorDataset

from lightning_cco import CCOCallback

COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_tests_a_copy_of_the_model_alike(copied: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cco, model = quick(), Classifier()
    make_trainer(tmp_path, cco).fit(model, batches(), batches(seed=5))
    expected = make_trainer(tmp_path, cco).test(model, batches(seed=5), verbose=False)
    in_float = make_trainer(tmp_path).test(COPIES[copied](model), batches(seed=5), verbose=False)
    twin = COPIES[copied](cco)
    assert twin.original_metrics == cco.original_metrics
    assert twin.settings == cco.settings
    found = make_trainer(tmp_path, twin).test(COPIES[copied](model), batches(seed=5), verbose=False)
    assert found == [pytest.approx(value) for value in expected]
    assert found != [pytest.approx(value, rel=1e-9) for value in in_float]
    assert cco.quantized.attached


def test_a_copy_begins_a_training_anew(tmp_path: Path) -> None:
    """As in each fold of a cross-validation: the ranges of one fold say nothing of the next."""
    torch.manual_seed(0)
    start = Classifier()
    first, fresh = quick(), quick()
    images, labels = batches().dataset.tensors
    larger = DataLoader(TensorDataset(100 * images, labels), 8)
    make_trainer(tmp_path, first, max_steps=1).fit(Classifier(), larger)
    copies = [copy.deepcopy(first), fresh]
    for cco in copies:
        make_trainer(tmp_path, cco, max_steps=1).fit(copy.deepcopy(start), batches())
    ranges = [{str(key): quantizer.get_ranges() for key, quantizer in cco.quantized.activations.items()} for cco in copies]
    torch.testing.assert_close(ranges[0], ranges[1])


class Named(CCOCallback):
    """A subclass with an attribute of its own."""

    name = ""


@pytest.mark.parametrize("copied", COPIES)
def test_a_callback_that_was_never_used(copied: str) -> None:
    cco = Named("w8a8")
    cco.name = "mine"
    twin = COPIES[copied](cco)
    assert (twin.name, twin.settings, twin.quantized, twin.state_dict()) == ("mine", cco.settings, None, {})


class Configured(Classifier):
    """Makes its callback for each run."""

    def configure_callbacks(self) -> list[Any]:
        return [quick()]


def test_a_new_callback_of_the_same_model_does_not_say_that_it_is_float(tmp_path: Path) -> None:
    """Warnings are errors here."""
    torch.manual_seed(0)
    model, trainer = Configured(), make_trainer(tmp_path)
    trainer.fit(model, batches(), batches(seed=5))
    x, _ = next(iter(batches(seed=5)))
    with torch.no_grad():
        trained = model.eval()(x)
        trainer.validate(model, batches(seed=5), verbose=False)
        assert torch.equal(model.eval()(x), trained)
