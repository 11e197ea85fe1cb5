"""A checkpoint's history of sensitivities that can't be what it is begins anew, with a warning; it never ends a training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from lightning_modules import Classifier, batches, make_trainer, quick

from lightning_cco import CCOWarning
from lightning_cco.monitoring.history import History

KEYS = ("layers", "epochs", "qs", "extremes", "previous", "followed", "count")


def history() -> dict[str, Any]:
    kept = History()
    for epoch in range(3):
        kept.add(epoch, {"conv": 0.5, "linear": 0.1 * epoch}, {"val_loss": 1.0 - epoch})
    return kept.state_dict()


@pytest.mark.parametrize("value", [None, "x", 1.5, [1], [[1]], ["x"], {"a": 1}, {"a": {"b": "c"}}, {3: [None]}, [{"epoch": 0}], True])
@pytest.mark.parametrize("key", KEYS)
def test_a_value_that_can_t_be_is_refused_by_name(key: str, value: Any) -> None:
    if (key, value) in (("previous", {"a": 1}), ("followed", ["x"])):
        return  # they can be
    kept = History()
    with pytest.raises(ValueError, match=r"^(layers|epochs|qs|extremes|previous|followed|count)(:|,)"):
        kept.load_state_dict({**history(), key: value})
    assert (kept.epochs, kept.count) == ([], 0)


@pytest.mark.parametrize("epochs", [[0, 0, 1], [2, 1, 0], [0, 1, True], [0, 1, "2"], [0, 1]])
def test_epochs_come_once_and_in_order(epochs: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"^(epochs|qs):"):
        History().load_state_dict({**history(), "epochs": epochs})


def test_what_was_saved_is_taken_back() -> None:
    kept = History()
    kept.load_state_dict(history())
    assert kept.state_dict() == history()
    kept.add(3, {"conv": 1.0}, {})
    assert kept.count == 4


def test_the_training_goes_on(tmp_path: Path) -> None:
    cco = quick()
    make_trainer(tmp_path, cco).fit(Classifier(), batches())
    state = copy.deepcopy(cco.state_dict())
    state["monitor"]["count"] = None
    resumed = quick()
    resumed.load_state_dict(state)
    trainer = make_trainer(tmp_path, resumed)
    with pytest.warns(CCOWarning, match=r"can't be read \(ValueError: count: expected int, got NoneType\); it begins anew"):
        trainer.fit(Classifier(), batches())
    assert trainer.global_step == 4
