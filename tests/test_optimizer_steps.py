"""Optimizers that run the model several times a step see one function of the weights within it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning_modules import make_trainer, quick
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cco import CCOCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|max_epochs|more than a thousand times).*")


class Ascending(torch.optim.SGD):
    """As sharpness-aware minimization does: up the gradient, then down by that of the place there."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"] if parameter.grad is not None]
        up = [0.1 * parameter.grad for parameter in parameters]
        with torch.no_grad():
            torch._foreach_add_(parameters, up)
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            torch._foreach_sub_(parameters, up)
        super().step()
        return loss


class Regression(pl.LightningModule):
    def __init__(self, cco: CCOCallback, make: Any, manual: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
        self.cco, self.make, self.automatic_optimization = cco, make, not manual
        self.ranges: dict[int, list[tuple[float, ...]]] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (self(batch[0]) - batch[1]).square().mean()
        if self.cco.quantized is None:
            return loss  # it is captured
        held = tuple(float(quantizer.scale) for quantizer in self.cco.quantized._activations.values())
        self.ranges.setdefault(batch_idx, []).append(held)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return self.loss(batch, batch_idx)
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch, batch_idx)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"), lambda p: Ascending(p, 0.1)],
    ids=["LBFGS", "ascending"],
)
def test_ranges_move_once_a_step(make: Any, manual: bool, tmp_path: Path) -> None:
    pl.seed_everything(1, verbose=False)
    x = torch.randn(64, 8)
    cco = quick(training_settings={"stats_steps": 2}, monitoring_settings={"draw_graph": False})
    module = Regression(cco, make, manual)
    make_trainer(tmp_path, cco, max_epochs=1).fit(module, DataLoader(TensorDataset(x, x[:, :1] * x[:, 1:2]), 16))
    assert cco.quantized is not None
    assert cco.quantized._activations
    assert all(len(held) > 1 and len(set(held)) == 1 for held in module.ranges.values())
    assert len({held[0] for held in module.ranges.values()}) == len(module.ranges) == 4, "they follow the training from step to step"
    optimizer = module.trainer.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_step_that_fails_holds_no_range_afterwards(tmp_path: Path) -> None:
    cco = quick(training_settings={"stats_steps": 2}, monitoring_settings={"draw_graph": False})
    module = Regression(cco, lambda p: torch.optim.LBFGS(p, max_iter=4), False)
    x = torch.randn(32, 8)

    def fail(loss: Tensor) -> None:
        raise RuntimeError("in the midst of a step")

    module.backward = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="in the midst"):
        make_trainer(tmp_path, cco, max_epochs=1).fit(module, DataLoader(TensorDataset(x, x[:, :1]), 16))
    assert cco.quantized is not None
    assert not cco.quantized._ranges.held
