"""Fake-quantization that starts at a step, and bits that change in stages: the training is that of a loop written by hand."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import Classifier, batches, make_trainer, quick
from test_distillation import Module, Net, assert_same, data, twins
from test_loader_untouched import LOADERS, seen
from torch import nn
from torch.utils.data import DataLoader

from lightning_cco import CCOCallback, CCOError, CCOWarning, load_quantized, load_settings, quantize
from lightning_cco.settings import BitsStage

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|use of fork|not resumable|max_epochs|draws random numbers in this process).*"
)

FOUR = {"at_step": 4, "weights_num_bits": 4, "activations_num_bits": 4}
TWO = {"at_epoch": 2, "weights_num_bits": 3}


class Plain(Net):
    """Without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Identity()


def scheduled(steps: int = 2, **training: Any) -> CCOCallback:
    return quick(training_settings={"stats_steps": steps, **training})


def loader(epoch: list[Any]) -> DataLoader:
    return DataLoader(epoch, batch_size=None, shuffle=False)


def fit(folder: Path, module: pl.LightningModule, cco: CCOCallback, *callbacks: pl.Callback, epochs: int = 2, **options: Any) -> pl.Trainer:
    torch.manual_seed(0)
    return make_trainer(folder, cco, *callbacks, max_epochs=epochs, **options)


def by_hand(module: pl.LightningModule, start: int, stages: dict[int, dict[str, Any]], epochs: int) -> pl.LightningModule:
    """Float until a step; then quantized, and calibrated on that step's batch and the next; at each stage planned and calibrated once more."""
    epoch = data()
    optimizer, quantized, step = module.configure_optimizers(), None, 0
    recipe: dict[str, Any] = {}
    for _ in range(epochs):
        for number, (x, y) in enumerate(epoch):
            module.train()
            recipe |= stages.get(step, {})
            fresh = [[batch[0]] for batch in epoch[number : number + 2]]
            if step == start:
                quantized = quantize(module, {"global_quantization_settings": recipe}, (x,))
                quantized.calibrate(fresh)
            elif step in stages and quantized is not None:
                names = quantized.replan(load_settings({"global_quantization_settings": recipe}))
                quantized.calibrate(fresh, only=names)
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
            step += 1
    assert quantized is not None
    quantized.update_ranges()
    quantized.remove()
    return module


@pytest.mark.parametrize("start", [1, 3, 4])
def test_a_training_that_starts_later(start: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine, reference = twins(lambda: Module(Plain(), F.cross_entropy))
    cco = scheduled(start_at_step=start)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, mine, cco).fit(mine, loader(data()))
    assert f"Fake-quantization starts at step {start}; until then the model trains in float." in caplog.text
    assert f"Fake-quantization starts at step {start}.\n" in caplog.text
    assert_same(mine, by_hand(reference, start, {}, 2))
    assert cco.quantized is not None
    assert cco.quantized.calibrated


def test_bits_that_change_in_stages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first in the midst of an epoch, the second at the start of one."""
    mine, reference = twins(lambda: Module(Plain(), F.cross_entropy))
    cco = scheduled(stages=[FOUR, TWO])
    with caplog.at_level(logging.INFO):
        fit(tmp_path, mine, cco, epochs=3).fit(mine, loader(data()))
    assert "Stage 1 of 2 begins at step 4 (epoch 1): weights of 4 bits, activations of 4." in caplog.text
    assert "Stage 2 of 2 begins at step 6 (epoch 2): weights of 3 bits, activations of 4." in caplog.text
    bits = {"weights_num_bits": 4, "activations_num_bits": 4}
    assert_same(mine, by_hand(reference, 0, {4: bits, 6: {"weights_num_bits": 3}}, 3))
    assert cco.quantized is not None
    assert cco.quantized.plan.decisions["conv_1"].weights_num_bits == 3
    resolved = {rule.match: rule.weights_num_bits for rule in load_settings(tmp_path / "cco" / "resolved_recipe.yaml").layer_settings}
    assert (resolved["conv"], resolved["conv_1"]) == (8, 3)  # convolutions of the input keep 8


def test_stages_before_the_start_and_rules(tmp_path: Path) -> None:
    """A stage that has begun when fake-quantization starts; a layer keeps the bits of its rule."""
    cco = quick(
        training_settings={"stats_steps": 1, "start_at_step": 2, "stages": [{"at_step": 1, "weights_num_bits": 3}]},
        layer_settings=[{"match": "conv", "weights_num_bits": 8}],
    )
    module = Module(Plain(), F.cross_entropy)
    fit(tmp_path, module, cco, epochs=1).fit(module, loader(data()))
    assert cco.quantized is not None
    assert [cco.quantized.plan.decisions[name].weights_num_bits for name in ("conv", "conv_1")] == [8, 3]


class GoesOn:
    """Gives its batches in order, and goes on where a checkpoint left it."""

    def __init__(self) -> None:
        self.at = 0

    def __len__(self) -> int:
        return len(data())

    def __iter__(self) -> Iterator[Any]:
        self.at %= len(self)
        while self.at < len(self):
            self.at += 1
            yield data()[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("save_at", [1, 3, 5])
def test_resumed_before_and_after_each_change(save_at: int, tmp_path: Path) -> None:
    """Before the start, between start and stage, after the stage; both in the midst of an epoch and at its end."""

    def recipe() -> CCOCallback:
        return scheduled(1, start_at_step=2, freeze_ranges_at_step=2, stages=[FOUR])

    whole, parts = twins(lambda: Module(Plain(), F.cross_entropy))
    straight = recipe()
    fit(tmp_path / "straight", whole, straight).fit(whole, GoesOn())
    saving = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=save_at, save_top_k=-1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "training_settings.*(ends before|ended at)", CCOWarning)
        fit(tmp_path / "first", parts, recipe(), saving, max_steps=save_at).fit(parts, GoesOn())
    again, resumed = Module(Plain(), F.cross_entropy), recipe()
    fit(tmp_path / "second", again, resumed).fit(again, GoesOn(), ckpt_path=saving.best_model_path)
    assert_same(again, whole)
    assert resumed.quantized is not None
    assert straight.quantized is not None
    assert resumed.quantized.plan.tensors == straight.quantized.plan.tensors
    assert resumed.schedule.stages == 1


def test_a_checkpoint_of_a_stage_is_of_its_bits(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    cco = scheduled(1, stages=[FOUR])
    module = Module(Plain(), F.cross_entropy)
    fit(tmp_path, module, cco, saving).fit(module, loader(data()))
    early, late = (tmp_path / "ckpt" / f"step={step}.ckpt" for step in (3, 6))
    for path, bits in ((early, 8), (late, 4)):
        loaded = load_quantized(Plain(), path, (data()[0][0],))
        assert loaded.plan.decisions["conv_1"].weights_num_bits == bits
        assert not loaded.uncalibrated


FAST = {"generator", "augmented in this process", "queue", "stateful", "two in a list"}


@pytest.mark.filterwarnings("ignore:.*activations_num_bits changes nothing")  # of a small net that keeps 8 bits
@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LOADERS])
def test_nothing_is_taken_from_the_loader(name: str, tmp_path: Path) -> None:
    """In the midst of an epoch, and of a window of accumulated gradients, too."""
    expected = seen(tmp_path, LOADERS[name], None)
    cco = scheduled(3, start_at_step=2, stages=[{"at_step": 4, "weights_num_bits": 4, "activations_num_bits": 4}])
    assert seen(tmp_path, LOADERS[name], cco) == expected
    assert cco.quantized is not None
    assert cco.quantized.calibrated


@pytest.mark.parametrize("name", ["generator", "queue", "augmented in workers"])
def test_nothing_is_taken_with_accumulated_gradients(name: str, tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 3, "limit_train_batches": 5}
    expected = seen(tmp_path, LOADERS[name], None, **options)
    assert seen(tmp_path, LOADERS[name], scheduled(9, start_at_step=1), **options) == expected


def test_epochs_in_float_are_told_and_measure_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cco = scheduled(start_at_step=4)
    with caplog.at_level(logging.INFO):
        make_trainer(tmp_path, cco, max_epochs=2).fit(Classifier(), batches(), batches())
    assert "Summary of epoch 0, trained in float\n  train_loss: " in caplog.text
    assert "Summary of epoch 1\n" in caplog.text
    assert cco.report is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*called none of the layers that are quantized")  # its validation runs no network
def test_a_best_checkpoint_from_before_the_start_is_exported_calibrated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Worse(Classifier):
        """The first epoch counts as the best."""

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", float(self.current_epoch))

    cco = quick(training_settings={"stats_steps": 2, "start_at_step": 4}, deployment_settings={"export_dir": str(tmp_path / "out")})
    saving = ModelCheckpoint(tmp_path / "ckpt", monitor="val_loss")
    with caplog.at_level(logging.INFO):
        make_trainer(tmp_path, cco, saving, max_epochs=2).fit(Worse(), batches(), batches())
    assert "is from before fake-quantization started (start_at_step): calibrated on the 2 batches kept by the callback" in caplog.text
    assert (tmp_path / "out" / "Worse_int8.onnx").is_file()
    fresh = scheduled(start_at_step=4)
    with pytest.warns(CCOWarning, match="runs in float: the checkpoint is from before fake-quantization started"):
        make_trainer(tmp_path, fresh).test(Classifier(), batches(), ckpt_path=saving.best_model_path, verbose=False)


def test_a_training_that_ends_before_the_start(tmp_path: Path) -> None:
    cco = quick(training_settings={"start_at_step": 100}, deployment_settings={"export_dir": str(tmp_path / "out")})
    with (
        pytest.warns(CCOWarning, match=r"start_at_step: 100: the training ends before \(4 steps, 1 epochs\)"),
        pytest.warns(CCOWarning, match="the training ended at step 4: the model was trained in float and is not compressed"),
    ):
        make_trainer(tmp_path, cco).fit(Classifier(), batches())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"start_at_step": -1}, r"start_at_step: expected a step of at least 0, or null, got -1"),
        ({"stages": [{"weights_num_bits": 4}]}, r"stages\[0\]: expected at_step or at_epoch, got neither"),
        ({"stages": [{"at_step": 1, "at_epoch": 1, "weights_num_bits": 4}]}, r"stages\[0\]: expected at_step or at_epoch, got both"),
        ({"stages": [{"at_step": 1}]}, r"stages\[0\]: a stage without bits changes nothing"),
        ({"stages": [FOUR, {**FOUR, "at_step": 4}]}, r"stages: expected stages in the order of their time, got at_step: 4, 4"),
        ({"stages": [{"at_step": 1, "weights_num_bits": 9}]}, r"stages\[0\].weights_num_bits: expected 2 to 8 bits, got 9"),
        ({"stages": [{"at_stp": 1, "weights_num_bits": 4}]}, r"stages\[0\].at_stp: unknown key.*at_step"),
        ({"stages": {"at_step": 1}}, r"stages: expected a list of stages, such as .*, got dict"),
        ({"stages": ["w4a4"]}, r"stages\[0\]: expected a mapping, got str"),
    ],
)
def test_what_can_not_be(training: dict[str, Any], message: str) -> None:
    with pytest.raises(CCOError, match=message):
        load_settings({"training_settings": training})


@pytest.mark.parametrize(
    ("general", "why"), [({"weight_only": True}, "no activations are rounded"), ({"activations_num_bits": 4}, "had these bits")]
)
def test_a_stage_that_changes_nothing_is_said(general: dict[str, Any], why: str, tmp_path: Path) -> None:
    stages = [{"at_step": 2, "activations_num_bits": 4, "weights_num_bits": 4}]
    cco = quick(training_settings={"stats_steps": 2, "stages": stages}, global_quantization_settings=general)
    module = Module(Plain(), F.cross_entropy)
    with pytest.warns(CCOWarning, match=rf"stages\[0\]\.activations_num_bits changes nothing: .*{why}"):
        fit(tmp_path, module, cco, epochs=1).fit(module, loader(data()))


def test_recipes_keep_their_stages(tmp_path: Path) -> None:
    settings = load_settings({"training_settings": {"stages": [FOUR, TWO]}})
    settings.save(tmp_path / "recipe.yaml")
    assert load_settings(tmp_path / "recipe.yaml") == settings
    assert settings.training_settings.stages[0] == BitsStage(at_step=4, weights_num_bits=4, activations_num_bits=4)
    with pytest.raises(CCOError, match=r"BitsStage: a stage without bits"):
        BitsStage(at_step=1)


def test_a_budget_does_not_go_with_it(tmp_path: Path) -> None:
    for training in ({"start_at_step": 2}, {"stages": [FOUR]}):
        cco = quick(training_settings=training, budget_settings={"average_bits": 4})
        with pytest.raises(CCOError, match=r"budget_settings.average_bits chooses each layer's bits before the first step"):
            make_trainer(tmp_path, cco).fit(Classifier(), batches())


def test_what_is_monitored_must_be_there(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, monitor="cco/qs_max")
    with pytest.raises(CCOError, match=r"start_at_step is 6, so 'cco/qs_max', which ModelCheckpoint monitors, is not there"):
        make_trainer(tmp_path, scheduled(start_at_step=6), saving, max_epochs=2).fit(Classifier(), batches())


@pytest.mark.filterwarnings("ignore:Found `dataloader_iter`")
def test_a_step_that_draws_its_batches_itself(tmp_path: Path) -> None:
    class Drawing(Classifier):
        def training_step(self, dataloader_iter: Iterator[Any]) -> torch.Tensor:
            batch, _, _ = next(dataloader_iter)
            return self._loss(batch)

    cco = scheduled(2, start_at_step=2, stages=[{"at_step": 5, "weights_num_bits": 4}])
    make_trainer(tmp_path, cco, max_epochs=2).fit(Drawing(), batches())
    assert cco.quantized is not None
    assert cco.quantized.calibrated
    assert cco.schedule.stages == 1
