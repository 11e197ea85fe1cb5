"""The teacher's life: where it is from, what a checkpoint and a resumed run know of it, and what can't be distilled."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import make_trainer, quick
from test_distillation import DISTILLATION, Module, Net, assert_same, by_hand, data, kl, twins
from torch import Tensor, nn
from torch.utils.data import DataLoader
from weight_averages import averaging

from lightning_cco import CCOCallback, CCOError, load_settings
from lightning_cco.sections import DistillationSettings


def callback(**more: Any) -> CCOCallback:
    return quick(distillation_settings={**DISTILLATION, **more}, training_settings={"stats_steps": 1, "freeze_ranges_at_step": 0})


def fit(
    folder: Path, module: pl.LightningModule, cco: CCOCallback, *callbacks: pl.Callback, ckpt: Any = None, **options: Any
) -> pl.Trainer:
    trainer = make_trainer(folder, cco, *callbacks, **options)
    trainer.fit(module, DataLoader(data(), batch_size=None), ckpt_path=ckpt)
    return trainer


def plain() -> pl.LightningModule:
    return Module(nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 5, 4), nn.Flatten()), F.cross_entropy)


def teacher_of(cco: CCOCallback) -> dict[str, Tensor]:
    assert cco.distiller.teacher is not None
    return cco.distiller.teacher.state_dict()


def assert_taught_by(cco: CCOCallback, weights: dict[str, Tensor]) -> None:
    assert teacher_of(cco).keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(teacher_of(cco)[name], value), name


def test_a_resumed_run_goes_on_with_the_same_teacher(tmp_path: Path) -> None:
    module, whole = twins(plain)
    start = copy.deepcopy(module.state_dict())
    first = callback()
    trainer = fit(tmp_path, module, first, ModelCheckpoint(tmp_path))
    path = trainer.checkpoint_callback.best_model_path
    saved = torch.load(path, weights_only=True)
    assert saved["state_dict"].keys() == start.keys()
    held = sum(tensor.numel() for tensor in _tensors(saved["callbacks"]))
    assert held < 100  # ranges, no teacher
    resumed, again = plain(), callback()
    fit(tmp_path, resumed, again, ckpt=path, max_epochs=2)
    assert_taught_by(again, start)
    fit(tmp_path / "whole", whole, callback(), max_epochs=2)
    assert_same(resumed, whole)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def test_trained_weights_are_never_the_teacher(tmp_path: Path) -> None:
    module, first = plain(), callback()
    start = {"state_dict": copy.deepcopy(module.state_dict())}
    path = fit(tmp_path, module, first, ModelCheckpoint(tmp_path)).checkpoint_callback.best_model_path
    kept = tmp_path / "cco" / "teacher.pt"
    kept.rename(tmp_path / "elsewhere.pt")
    with pytest.raises(CCOError, match=r"teacher's file .* is not there.*Write distillation_settings.teacher"):
        fit(tmp_path, plain(), callback(), ckpt=path, max_epochs=2)
    fit(tmp_path, plain(), callback())  # another run in the same folder
    with pytest.raises(CCOError, match="of another run than the checkpoint"):
        fit(tmp_path, plain(), callback(), ckpt=path, max_epochs=2)
    torch.save(start, tmp_path / "float.ckpt")
    named = callback(teacher=str(tmp_path / "float.ckpt"))
    fit(tmp_path, plain(), named, ckpt=path, max_epochs=2)
    assert_taught_by(named, start["state_dict"])
    with pytest.raises(CCOError, match="checkpoint of a compressed training"):
        fit(tmp_path, plain(), callback(teacher=path))


def test_distillation_that_begins_in_a_resumed_run_wants_a_file(tmp_path: Path) -> None:
    path = fit(tmp_path, plain(), quick(), ModelCheckpoint(tmp_path)).checkpoint_callback.best_model_path
    with pytest.raises(CCOError, match="does not say where its float weights are"):
        fit(tmp_path, plain(), callback(), ckpt=path, max_epochs=2)
    cco, module = callback(), plain()
    make_trainer(tmp_path, cco).validate(module, DataLoader(data(), batch_size=None), ckpt_path=path, verbose=False)
    with pytest.raises(CCOError, match="does not say where its float weights are"):
        fit(tmp_path, module, cco)


def test_a_second_fit_keeps_the_teacher_and_another_model_gets_its_own(tmp_path: Path) -> None:
    module, cco = plain(), callback()
    start = copy.deepcopy(module.state_dict())
    fit(tmp_path, module, cco)
    fit(tmp_path, module, cco)
    assert_taught_by(cco, start)
    other = plain()
    start = copy.deepcopy(other.state_dict())
    fit(tmp_path, other, cco)
    assert_taught_by(cco, start)


def test_a_checkpoint_of_another_run_brings_its_own_teacher(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module, cco, keeper = plain(), callback(), ModelCheckpoint(tmp_path / "first")
    start = copy.deepcopy(module.state_dict())
    fit(tmp_path / "first", module, cco, keeper)
    other = callback()
    second = plain()
    fit(tmp_path / "second", second, other)
    fit(tmp_path / "second", second, other, ckpt=keeper.best_model_path, max_epochs=2)
    assert_taught_by(other, start)


def test_averaged_weights_and_an_interrupted_run(tmp_path: Path) -> None:
    module, reference = twins(plain)
    fit(tmp_path, module, callback(), averaging("WeightAveraging", avg_fn=lambda mean, new, count: new), max_epochs=1)
    assert_same(module, by_hand(reference, data(), kl))

    class Stops(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise ValueError("stop")

    cco, trainer = callback(), make_trainer(tmp_path, Stops())
    trainer = make_trainer(tmp_path, cco, Stops())
    with pytest.raises(ValueError, match="stop"):
        trainer.fit(plain(), DataLoader(data(), batch_size=None))
    assert "backward" not in vars(trainer.strategy)


class Auxiliary(Net):
    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return (scores, scores.softmax(1)) if self.training else scores


class Loose(Module):
    """A step that computes between the pieces."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), F.cross_entropy)
        self.encoder, self.decoder = nn.Linear(36, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.relu(self.encoder(x.flatten(1))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.decoder(torch.relu(self.encoder(batch[0].flatten(1)))), batch[1])


class Inside(Module):
    """A step that returns a loss computed inside of the network."""

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch)


class Unheard(Module):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx).backward()


def first_of(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output[0] if isinstance(output, tuple) else output, labels)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: Module(Auxiliary(), first_of),
            r"output\[0\] of the model has the shape \(4, 5\) in training, and of the teacher.* no such output",
        ),
        (Loose, "'decoder' reads a tensor of shape .4, 12. that the step itself computes"),
        (lambda: Unheard(Net(), F.cross_entropy), "never called self.manual_backward"),
        (lambda: Module(Net(), lambda logits, labels: F.cross_entropy(logits.mul_(2), labels)), "the step writes to what 'the model' gave"),
    ],
)
def test_what_cannot_be_distilled_ends_before_a_step(tmp_path: Path, make: Any, match: str) -> None:
    module = make()
    start = copy.deepcopy(module.state_dict())
    with pytest.raises(CCOError, match=match):
        fit(tmp_path, module, callback())
    for name, value in module.named_parameters():
        assert torch.equal(value, start[name]), name


def test_a_loss_inside_of_the_network_leaves_the_layers(tmp_path: Path) -> None:
    cco = callback(on="layers")
    fit(tmp_path, Inside(Net(), F.cross_entropy), cco)


def test_settings() -> None:
    read = load_settings({"distillation_settings": {True: "layers", "weight": 1}}).distillation_settings  # YAML reads `on` as true
    assert (read.on, read.weight, read.temperature, read.loss, read.teacher) == ("layers", 1.0, 2.0, "auto", None)
    for wrong, match in [
        ({"weight": 1.5}, "0 .no distillation. to 1"),
        ({"temperature": 0}, "above 0"),
        ({"on": "logits"}, "outputs"),
        ({"loss": "ce"}, "kl"),
    ]:
        with pytest.raises(CCOError, match=match):
            DistillationSettings(**wrong)  # type: ignore[arg-type]
