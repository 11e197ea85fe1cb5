"""Teachers, averaged copies and momentum encoders stay in float; frozen parts of the deployed model do not."""

from __future__ import annotations

import copy
import logging
import tempfile
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cco import CCOCallback, quantize


def net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


class Distillation(pl.LightningModule):
    """A frozen network beside the trained one, asked in the step without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = net(8), net(16).requires_grad_(False).eval()
        self.targets: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(batch)
        self.targets.append((batch, wanted))
        return F.mse_loss(self.student(batch), wanted)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.student.parameters(), 0.01)


class DistillationWithForward(Distillation):
    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)


class Perceptual(DistillationWithForward):
    """Gradients run through the frozen network, which `forward` has nothing to do with."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        inputs = torch.cat([self(batch), batch[:, :1]], 1)
        self.targets.append((inputs.detach(), self.teacher(inputs).detach()))
        return self.teacher(inputs).square().mean()


@pytest.mark.parametrize("module_class", [Distillation, DistillationWithForward, Perceptual])
def test_a_teacher_stays_in_float_and_the_log_says_so(module_class: type[Distillation], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    module, cco = module_class(), CCOCallback({"monitoring_settings": {"draw_graph": False}})
    alone = copy.deepcopy(module.teacher)
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=2, callbacks=[cco], logger=False, default_root_dir=tempfile.mkdtemp(), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        trainer.fit(module, DataLoader(torch.randn(8, 4), 4, num_workers=0))
    assert cco.quantized is not None
    paths = {cco.quantized.graph[name].path for name in cco.quantized.plan.quantized}
    assert {"student.0", "student.2"} <= paths
    assert not [path for path in paths if path.startswith("teacher")]
    x, found = module.targets[-1]
    torch.testing.assert_close(found, alone(x), rtol=0, atol=0)
    assert "teacher" in caplog.text
    assert cco.quantized.drift == []


class Nested(nn.Module):
    def __init__(self, gradients: bool, head: bool) -> None:
        super().__init__()
        self.backbone, self.other = net(8).requires_grad_(False), net(8)
        self.head = nn.Linear(3, 2) if head else None
        self.gradients = gradients

    def forward(self, x: Tensor) -> Any:
        with torch.set_grad_enabled(self.gradients and torch.is_grad_enabled()):
            features = self.backbone(x)
        return self.head(features) if self.head is not None else (features, self.other(x))


@pytest.mark.parametrize(("gradients", "head"), [(True, False), (True, True), (False, True)])
def test_a_frozen_part_of_the_deployed_model_is_quantized(gradients: bool, head: bool) -> None:
    quantized = quantize(Nested(gradients, head), None, (torch.randn(5, 4),))
    assert [name for name in quantized.plan.quantized if quantized.graph[name].path.startswith("backbone")]


def test_a_copy_that_forward_asks_without_gradients_stays_in_float() -> None:
    model, x = Nested(False, False), torch.randn(5, 4)
    alone = copy.deepcopy(model.backbone)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([(x,)])
    assert {quantized.graph[name].path.partition(".")[0] for name in quantized.plan.quantized if name != "input_0"} == {"other"}
    torch.testing.assert_close(model(x)[0], alone(x), rtol=0, atol=0)


def test_a_model_that_is_frozen_as_a_whole_is_quantized() -> None:
    model, x = net(8).requires_grad_(False), torch.randn(5, 4)
    quantized = quantize(model, None, (x,))
    assert {"linear", "linear_1"} <= set(quantized.plan.quantized)
