"""The models of the matrix under a Trainer: fit, stop, resume, test the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matrix_code
import matrix_models
import matrix_transformers
import pytest
import torch
import torch.nn.functional as F
from lightning_modules import make_trainer
from matrix_case import Case
from matrix_values import loss_of, repeatable
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cco import CCOCallback

# Experts of transformers are multiplied by a function without an INT8 kernel, which is said.
pytestmark = pytest.mark.filterwarnings("ignore:.*grouped_mm:lightning_cco.errors.CCOWarning")

CASES = [*matrix_models.CASES, *matrix_code.CASES, *matrix_transformers.CASES]
QUICK = {
    "autoencoder",
    "multihead_attention",
    "lstm",
    "parametrized",
    "training_branch",
    "integers",
    "nested",
    "frozen_backbone",
    "lora",
    "hf_bert",
}


class Stepping(pl.LightningModule):
    """No forward: the step runs a model of the matrix on a batch."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.net = case, case.make()
        case.run(self.net, case.batch())  # builds lazy layers
        repeatable(self.net)

    def loss(self, batch: Any) -> Tensor:
        return loss_of(self.case.run(self.net, batch))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-3)


class Adversaries(pl.LightningModule):
    """Two networks, two optimizers, and the step says what happens when."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = matrix_models.GAN()
        repeatable(self.net)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.net.discriminator(self.net.generator(batch[1])).square().mean()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        of_generator, of_discriminator = self.optimizers()
        real, noise = batch
        fake = self.net.generator(noise)
        self._step(of_generator, self.net.discriminator(fake), target=1.0)
        self._step(of_discriminator, self.net.discriminator(torch.cat([real, fake.detach()])), target=0.5)

    def _step(self, optimizer: Any, scores: Tensor, target: float) -> None:
        optimizer.zero_grad()
        self.manual_backward(F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, target)))
        optimizer.step()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), batch_size=1)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(net.parameters(), 1e-3) for net in (self.net.generator, self.net.discriminator)]


def loader(case: Case) -> DataLoader:
    torch.manual_seed(7)
    return DataLoader([case.batch() for _ in range(2)], batch_size=None)


def new_module(case: Case) -> Stepping | Adversaries:
    return Adversaries() if case.name == "gan" else Stepping(case)


def fitted(case: Case, folder: Path, epochs: int, ckpt: str | None = None) -> tuple[Stepping | Adversaries, CCOCallback]:
    torch.manual_seed(1)
    module = new_module(case)
    cco = CCOCallback({"training_settings": {"stats_steps": 2}, "monitoring_settings": {"draw_graph": False, "sensitivity_batches": 1}})
    trainer = make_trainer(folder, cco, max_epochs=epochs)
    trainer.fit(module, loader(case), ckpt_path=ckpt)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, cco


@pytest.mark.filterwarnings(
    "ignore:.*a batch gave values more than a thousand times"
)  # ConvNeXt's factors begin at 1e-6, and grow in the first step
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[] if case.name in QUICK | {"gan"} else pytest.mark.slow) for case in CASES]
)
def test_fit_resume_and_test(case: Case, tmp_path: Path) -> None:
    whole, cco = fitted(case, tmp_path / "whole", 2)
    fitted(case, tmp_path / "half", 1)
    resumed, cco_resumed = fitted(case, tmp_path / "rest", 2, str(tmp_path / "half" / "last.ckpt"))
    assert cco.quantized is not None
    assert cco_resumed.quantized is not None
    assert cco.quantized.drift == cco_resumed.quantized.drift == []
    plans = [found.quantized.plan for found in (cco, cco_resumed)]
    assert plans[0].quantized == plans[1].quantized
    assert plans[0].weight_only == plans[1].weight_only
    assert plans[0].quantized or plans[0].weight_only
    for (name, expected), found in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)
    for key, quantizer in cco.quantized.activations.items():
        torch.testing.assert_close(cco_resumed.quantized.activations[key].scale, quantizer.scale, rtol=1e-4, atol=0.0)

    def loss_of_checkpoint(cco: list[pl.Callback]) -> float:
        trainer = make_trainer(tmp_path, *cco)
        checkpoint = tmp_path / "whole" / "last.ckpt"
        return trainer.test(new_module(case), loader(case), ckpt_path=checkpoint, verbose=False)[0]["test_loss"]

    whole.eval()
    with torch.no_grad():
        losses = [float(whole.loss(batch)) for batch in loader(case)]
    tested = loss_of_checkpoint([CCOCallback()])
    assert tested == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert tested != loss_of_checkpoint([])
