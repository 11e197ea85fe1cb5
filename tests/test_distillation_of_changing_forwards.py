"""Forwards that draw random numbers, read the Trainer, or compute with numbers that the training changes: the teacher computes what the student does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning_modules import make_trainer, quick
from test_distillation import TEMPERATURE, Module, assert_same, data, fitted
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cco import quantize
from lightning_cco.distillation.step_comparison import StepComparison
from lightning_cco.distillation.terms import binary_divergence, class_divergence, squared_error


class Masking(nn.Module):
    """Hides a part of its input by chance, and reconstructs it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.relu(self.encoder(x * (torch.rand(x.shape[:-1]) < 0.5)[..., None])))


class Sampling(nn.Module):
    """A variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU()), nn.Linear(6, 36)
        self.mean, self.variance = nn.Linear(12, 6), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        features = self.encoder(x)
        mean, variance = self.mean(features), self.variance(features)
        return self.decoder(torch.relu(mean + torch.randn_like(mean) * (variance / 2).exp())).view(x.shape)


class Annealed(nn.Module):
    """Logits over a temperature that the training sets; their sign changes from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 5))
        self.temperature, self.negative = 1.0, False

    def forward(self, x: Tensor) -> Tensor:
        self.negative = not self.negative
        return self.layers(x) / self.temperature * (-1.0 if self.negative else 1.0)


def like_its_input(student: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(student, torch.ones_like(student))


@pytest.mark.parametrize("net", [Masking, Sampling])
def test_random_numbers_of_a_forward_are_the_teachers_too(net: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Module(net(), like_its_input)
    reference = copy.deepcopy(module)
    done = fitted(tmp_path, module, data(), {"weight": 0.7, "loss": "mse"})
    teacher = copy.deepcopy(reference).eval()
    quantized = quantize(reference, {"training_settings": {"freeze_ranges_at_step": 0}}, (data()[0][0],))
    ranges = {name: quantizer.state_dict() for name, quantizer in done.cco.quantized.activations.items()}
    quantized.calibrate([[data()[0][0]]])
    for name, quantizer in quantized.activations.items():  # those of the calibration depend on what was drawn there
        quantizer.load_state_dict(ranges[name])
    quantized.freeze_ranges()
    optimizer = reference.configure_optimizers()
    reference.train()
    torch.manual_seed(3)
    for x, _ in data():
        drawn = torch.get_rng_state()
        student = reference(x)
        after = torch.get_rng_state()
        torch.set_rng_state(drawn)
        with torch.no_grad():
            taught = teacher(x)
        torch.set_rng_state(after)
        (0.7 * F.mse_loss(student, taught) + 0.3 * like_its_input(student, None)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(module, reference, within=1e-5)


class Schedule(pl.Callback):
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.net.temperature = 1.0 / (1 + 3 * trainer.current_epoch)


class OfTheEpoch(Module):
    """Reads the Trainer in its forward, and logs there."""

    def forward(self, x: Tensor) -> Tensor:
        self.log("steps", float(self.trainer.global_step))
        return self.net(x) * (1.0 + 3 * self.current_epoch)


@pytest.mark.parametrize(
    ("make", "callbacks"),
    [
        pytest.param(lambda: Module(Annealed(), F.cross_entropy, 1e-4), [Schedule()], id="a number that a callback sets"),
        pytest.param(lambda: OfTheEpoch(Annealed().layers, F.cross_entropy, 1e-4), [], id="the Trainer's epoch"),
    ],
)
def test_what_the_training_changes_reaches_the_teacher(
    make: Callable[[], Module], callbacks: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[float] = []
    pair = StepComparison.pair

    def noted(self: StepComparison, key: Any) -> tuple[Tensor, Tensor]:
        student, teacher = pair(self, key)
        errors.append(float((student.detach() - teacher).norm() / teacher.norm()))
        return student, teacher

    monkeypatch.setattr(StepComparison, "pair", noted)
    torch.manual_seed(0)
    module, cco = make(), quick(distillation_settings={"weight": 0.5}, training_settings={"stats_steps": 1})
    trainer = make_trainer(tmp_path, cco, *callbacks, max_epochs=2)
    trainer.fit(module, DataLoader(data(), batch_size=None))
    assert len(errors) >= 6
    assert max(errors) < 0.3  # at almost the same weights; 0.75 with another factor
    assert cco.distiller.teacher is not None
    assert cco.distiller.teacher._trainer is None
    assert trainer.callback_metrics.get("steps", torch.zeros(())) < 6


@pytest.mark.parametrize("masked", [torch.tensor([True, False, False]), torch.tensor([False, True, True])])
def test_infinite_logits_of_a_mask_add_nothing(masked: Tensor) -> None:
    torch.manual_seed(0)
    free, taught = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    rest = ~masked
    for term in (
        lambda student, teacher: class_divergence(student, teacher, 1, TEMPERATURE),
        lambda student, teacher: binary_divergence(student, teacher, TEMPERATURE) * teacher.numel(),
        lambda student, teacher: squared_error(student, teacher) * teacher.numel(),
    ):
        free.grad = None
        found = term(free.masked_fill(masked, -torch.inf), taught.masked_fill(masked, -torch.inf))
        found.backward()
        gradient, free.grad = free.grad, None
        expected = term(free[:, rest], taught[:, rest])
        expected.backward()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient, free.grad)
