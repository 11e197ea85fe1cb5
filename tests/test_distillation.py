"""Distillation gives the gradients of a loop written by hand: explicit loss, explicit teacher, no Lightning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from lightning_modules import make_trainer, quick
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_cco import quantize

WEIGHT, TEMPERATURE, STEPS = 0.7, 2.0, 3
DISTILLATION: dict[str, Any] = {"weight": WEIGHT, "temperature": TEMPERATURE}
Loss = Callable[[Any, Any], Tensor]


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """As it is usually written: classes in the last dimension, all else a batch."""
    mine, wanted = (F.log_softmax(logits.reshape(-1, logits.shape[-1]).float() / TEMPERATURE, 1) for logits in (student, teacher))
    return TEMPERATURE**2 * F.kl_div(mine, wanted, log_target=True, reduction="batchmean")


class Net(nn.Module):
    """Convolutions with everything that a teacher must not share: batch norm and dropout."""

    def __init__(self, outputs: int = 5, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3), nn.ReLU())
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(6, outputs)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed is None or not torch.is_grad_enabled():
            features = self.body(x)
        else:
            features = checkpoint(self.body, x.requires_grad_(), use_reentrant=self.checkpointed)
        return self.head(self.drop(features.mean((2, 3))))


class Module(pl.LightningModule):
    """A network, a loss and SGD."""

    def __init__(self, net: nn.Module, loss: Loss, rate: float = 0.05) -> None:
        super().__init__()
        self.net, self.loss, self.rate = net, loss, rate

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rate)


class Seeded(pl.Callback):
    """The same random numbers from the first step on."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            torch.manual_seed(3)


def data(classes: int = 5, shape: tuple[int, ...] = (1, 6, 6), target: Callable[[int], Tensor] | None = None) -> list[Any]:
    generator = torch.Generator().manual_seed(5)
    make = target or (lambda size: torch.randint(0, classes, (size,), generator=generator))
    return [(torch.randn(4, *shape, generator=generator), make(4)) for _ in range(STEPS)]


def fitted(folder: Path, module: pl.LightningModule, batches: list[Any], settings: dict[str, Any] | None = None, **options: Any) -> Any:
    """Fit with distillation; the callback."""
    cco = quick(
        distillation_settings=DISTILLATION if settings is None else settings,
        training_settings={"stats_steps": 1, "freeze_ranges_at_step": 0},
    )
    made = getattr(module, "_orig_mod", module)
    trainer = make_trainer(folder, cco, Seeded(), **options)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return SimpleNamespace(cco=cco, module=made, trainer=trainer)


def by_hand(
    module: pl.LightningModule, batches: list[Any], term: Callable[[Any, Any], Tensor], weight: float = WEIGHT, every: int = 1
) -> pl.LightningModule:
    """The same training, written out."""
    teacher = copy.deepcopy(module).eval()
    x = batches[0][0]
    quantized = quantize(module, {"training_settings": {"freeze_ranges_at_step": 0}}, (x,))
    quantized.calibrate([[x]])
    quantized.freeze_ranges()
    optimizer = module.configure_optimizers()
    module.train()
    torch.manual_seed(3)
    for number, batch in enumerate(batches):
        student = module(batch[0].clone())
        with torch.no_grad():
            taught = teacher(batch[0].clone())
        loss = weight * term(student, taught)
        if weight < 1:
            loss = loss + (1 - weight) * module.loss(student, batch[1])
        (loss / every).backward()
        if (number + 1) % every == 0 or number + 1 == len(batches):
            optimizer.step()
            optimizer.zero_grad()
    quantized.remove()
    return module


def assert_same(mine: nn.Module, reference: nn.Module, within: float = 1e-6) -> None:
    wanted = dict(reference.named_parameters())
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=0, atol=within, msg=lambda text, name=name: f"{name}: {text}")


def twins(make: Callable[[], pl.LightningModule]) -> tuple[pl.LightningModule, pl.LightningModule]:
    torch.manual_seed(0)
    module = make()
    return module, copy.deepcopy(module)


@pytest.mark.parametrize("checkpointed", [None, False, True])
def test_classes(tmp_path: Path, checkpointed: bool | None) -> None:
    """The teacher draws no random numbers either: the masks of dropout are those of the loop."""
    module, reference = twins(lambda: Module(Net(checkpointed=checkpointed), F.cross_entropy))
    start = copy.deepcopy(module)
    run = fitted(tmp_path, module, data())
    assert_same(module, by_hand(reference, data(), kl))
    assert max(float((a - b).detach().abs().max()) for a, b in zip(module.parameters(), start.parameters(), strict=True)) > 1e-3
    teacher = run.cco.distiller.teacher
    for name, value in start.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], value)
    assert set(module.state_dict()) == set(start.state_dict())
    assert "backward" not in vars(run.trainer.strategy)
    assert float(run.trainer.callback_metrics["cco/distillation_loss"]) > 0


def test_accumulated_gradients(tmp_path: Path) -> None:
    module, reference = twins(lambda: Module(Net(), F.cross_entropy))
    fitted(tmp_path, module, data(), accumulate_grad_batches=2)
    assert_same(module, by_hand(reference, data(), kl, every=2))


class ByHand(Module):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        with torch.no_grad():
            self(batch[0])  # a look at the outputs is not compared
        torch.manual_seed(batch_idx)
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def test_manual_optimization(tmp_path: Path) -> None:
    module, reference = twins(
        lambda: ByHand(nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 5, 4), nn.Flatten()), F.cross_entropy)
    )
    fitted(tmp_path, module, data())
    assert_same(module, by_hand(reference, data(), kl))


def test_a_scaler_of_gradients_scales_both(tmp_path: Path) -> None:
    module, reference = twins(lambda: Module(Net(), F.cross_entropy))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fitted(tmp_path, module, data(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.get_scale() == 1024.0  # and no step was skipped
    assert_same(module, by_hand(reference, data(), kl), within=2e-3)


def test_bf16_mixed(tmp_path: Path) -> None:
    module, reference = twins(lambda: Module(Net(), F.cross_entropy))
    fitted(tmp_path, module, data(), precision="bf16-mixed")
    assert_same(module, by_hand(reference, data(), kl), within=2e-3)


def test_label_free(tmp_path: Path) -> None:
    """With weight 1 the step's loss says nothing, not even where it is NaN."""
    module, reference = twins(lambda: Module(Net(), lambda logits, labels: F.cross_entropy(logits, labels, ignore_index=-100)))
    unlabelled = data(target=lambda size: torch.full((size,), -100))
    fitted(tmp_path, module, unlabelled, {"weight": 1.0, "temperature": TEMPERATURE})
    assert_same(module, by_hand(reference, unlabelled, kl, weight=1.0))


def test_regression(tmp_path: Path) -> None:
    module, reference = twins(lambda: Module(Net(outputs=3), F.mse_loss))
    targets = data(target=lambda size: torch.linspace(-1, 1, 3 * size).view(size, 3))
    fitted(tmp_path, module, targets)
    assert_same(module, by_hand(reference, targets, F.mse_loss))


def test_yes_or_no(tmp_path: Path) -> None:
    def term(student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = student / TEMPERATURE, teacher / TEMPERATURE
        return TEMPERATURE**2 * F.binary_cross_entropy_with_logits(student, teacher.sigmoid())  # the entropy has no gradient

    module, reference = twins(lambda: Module(Net(outputs=3), F.binary_cross_entropy_with_logits))
    targets = data(target=lambda size: (torch.arange(3 * size).view(size, 3) % 2).float())
    fitted(tmp_path, module, targets)
    assert_same(module, by_hand(reference, targets, term))


class Tokens(nn.Module):
    """A language model that returns a dict, with a state beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.mix(self.embed(ids)))
        return {"hidden": (hidden,), "logits": self.head(hidden)}


def test_token_logits_in_a_dict(tmp_path: Path) -> None:
    def loss(output: dict[str, Tensor], ids: Tensor) -> Tensor:
        return F.cross_entropy(output["logits"][:, :-1].reshape(-1, 11), ids[:, 1:].reshape(-1))

    generator = torch.Generator().manual_seed(0)
    sentences = [(ids, ids) for ids in torch.randint(0, 11, (STEPS, 4, 7), generator=generator)]
    module, reference = twins(lambda: Module(Tokens(), loss))
    fitted(tmp_path, module, sentences)
    assert_same(module, by_hand(reference, sentences, lambda student, teacher: kl(student["logits"], teacher["logits"])))


def test_what_the_loss_does_not_read_is_not_compared(tmp_path: Path) -> None:
    """Logits beside probabilities that are worked out of them, and features that the logits are worked out of."""

    class Three(Net):
        def forward(self, x: Tensor) -> Any:
            features = self.body(x).mean((2, 3))
            logits = self.head(self.drop(features))
            return SimpleNamespace(features=features, logits=logits, scores=logits.softmax(1))

    module, reference = twins(lambda: Module(Three(), lambda output, labels: F.cross_entropy(output.logits, labels)))
    fitted(tmp_path, module, data())
    assert_same(module, by_hand(reference, data(), lambda student, teacher: kl(student.logits, teacher.logits)))


def test_pixels_in_the_second_dimension(tmp_path: Path) -> None:
    module, reference = twins(lambda: Module(nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)), F.cross_entropy))
    masks = data(target=lambda size: torch.arange(size * 16).view(size, 4, 4) % 4)
    fitted(tmp_path, module, masks)
    assert_same(module, by_hand(reference, masks, lambda student, teacher: kl(student.movedim(1, -1), teacher.movedim(1, -1))))
