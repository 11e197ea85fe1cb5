"""Compiled, in other precisions, checkpointed, accumulated, clipped or by hand: a fake-quantized model is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning_modules import Classifier, assert_acts, assert_quantized, batches, plain_losses, quick, run_fit
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_cco import CCOCallback


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same_with_frozen_ranges(folder: Path, eager: Callable[[], Any], compiled: Callable[[], Any]) -> None:
    """Compiled, moving ranges follow a part of each batch only."""
    frozen = {"training_settings": {"stats_steps": 2, "freeze_ranges_at_step": 0}}
    first, second = (run_fit(folder, make, cco=quick(**frozen)).losses for make in (eager, compiled))
    assert second == pytest.approx(first, rel=1e-4)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_submodule_is_one_graph_with_the_same_losses(tmp_path: Path) -> None:
    backend = CompileCounterWithBackend("aot_eager")
    compiled_for = []

    class Compiled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.compile(backend=backend, fullgraph=True)

        def on_train_start(self) -> None:
            compiled_for.append(backend.frame_count)

    run = run_fit(tmp_path, Compiled, val=batches())
    # The sanity check compiled the float net: that code must not run on. Then one graph for evaluation, which the calibrated net ran, and one for training.
    assert compiled_for == [2]
    assert backend.frame_count == 3
    assert_quantized(run)
    assert run.losses != pytest.approx(plain_losses(tmp_path, Classifier), rel=1e-4)
    assert_same_with_frozen_ranges(tmp_path, Classifier, Compiled)


class Silent(Classifier):
    """`self.log` can't be compiled: Lightning inspects the signature of what is compiled."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_lightning_module_has_no_more_graphs_than_without(tmp_path: Path) -> None:
    backend = CompileCounterWithBackend("aot_eager")
    plain_losses(tmp_path, lambda: torch.compile(Silent(), backend=backend))
    plain = backend.frame_count
    assert plain > 0
    torch._dynamo.reset()
    backend.clear()
    run = run_fit(tmp_path, lambda: torch.compile(Silent(), backend=backend))
    assert backend.frame_count == plain
    assert_quantized(run)
    assert_same_with_frozen_ranges(tmp_path, Silent, lambda: torch.compile(Silent(), backend=backend))


# 16-true has no test: Adam's epsilon is 0 in it, with or without the callback.
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_precision(precision: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    plain = plain_losses(tmp_path, Classifier, precision=precision)
    run = run_fit(tmp_path, Classifier, val=batches(), precision=precision)
    assert {p.dtype for p in run.model.parameters()} == {dtype}
    # An 8-bit scale of eight bits itself would move every level.
    assert all(q.scale.dtype is q.min_val.dtype is torch.float32 for q in run.cco.quantized.activations.values())
    assert_quantized(run, batches().dataset.tensors[0].to(dtype))
    if precision != "bf16-true":  # whose losses have eight bits, of which the rounding of a few steps changes none
        assert run.losses != plain
    assert run.losses == pytest.approx(plain, rel=0.1)


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
def test_16_mixed_is_bf16_mixed_on_a_cpu(tmp_path: Path) -> None:
    run = run_fit(tmp_path, Classifier, precision="16-mixed")
    assert_quantized(run)
    assert run.losses == run_fit(tmp_path, Classifier, precision="bf16-mixed").losses


@pytest.mark.parametrize("estimator", ["percentile", "mse", "min_max"])
def test_bf16_true_with_each_range_estimator(estimator: str, tmp_path: Path) -> None:
    cco = quick(training_settings={"stats_steps": 2, "range_estimator": estimator})
    run = run_fit(tmp_path, Classifier, cco=cco, precision="bf16-true")
    assert_quantized(run, batches().dataset.tensors[0].bfloat16(), unmoved=99 if estimator == "min_max" else 0)


class Small(pl.LightningModule):
    """Without batch norm, so that a batch in parts gives the gradients of the whole; its body may be checkpointed."""

    def __init__(self, lr: float = 0.1, reentrant: bool | None = None) -> None:
        super().__init__()
        self.lr, self.reentrant = lr, reentrant
        self.first = nn.Conv2d(1, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
        self.head = nn.Linear(4 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.head(x.flatten(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


def all_batches_at_once() -> CCOCallback:
    """Ranges that do not depend on how the data are cut into batches."""
    return quick(training_settings={"stats_steps": 99, "range_estimator": "min_max", "freeze_ranges_at_step": 0})


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path: Path) -> None:
    data = batches().dataset
    parts = run_fit(tmp_path, Small, train=DataLoader(data, 8), cco=all_batches_at_once(), accumulate_grad_batches=2)
    whole = run_fit(tmp_path, Small, train=DataLoader(data, 16), cco=all_batches_at_once())
    assert parts.trainer.global_step == whole.trainer.global_step == 2
    torch.testing.assert_close(flat(parts.model), flat(whole.model), rtol=1e-4, atol=1e-5)
    assert_acts(parts.cco)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped(algorithm: str, tmp_path: Path) -> None:
    steps = []

    class Watched(Small):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            steps.append(flat(self))

        def on_train_batch_end(self, *args: Any) -> None:
            steps.append(flat(self))

    run = run_fit(tmp_path, lambda: Watched(lr=1.0), gradient_clip_val=1e-2, gradient_clip_algorithm=algorithm)
    assert_quantized(run)
    moved = steps[1] - steps[0]
    length = moved.norm() if algorithm == "norm" else moved.abs().max()
    assert float(length) == pytest.approx(1e-2, rel=1e-2)


# The reentrant variant warns whenever it runs without gradients, in any validation too.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_trains_the_same_weights(reentrant: bool, tmp_path: Path) -> None:
    plain = run_fit(tmp_path, Small)
    run = run_fit(tmp_path, lambda: Small(reentrant=reentrant))
    assert_quantized(run)
    assert run.cco.quantized.plan.quantized == plain.cco.quantized.plan.quantized
    assert run.losses == pytest.approx(plain.losses, rel=1e-5)
    torch.testing.assert_close(flat(run.model), flat(plain.model))
    for key, after in run.ranges.after.items():  # the recomputation is not another batch
        torch.testing.assert_close(after, plain.ranges.after[key])


class ByHand(Small):
    """Manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return {"loss": loss.detach()}


def test_manual_optimization_trains_the_same_weights(tmp_path: Path) -> None:
    by_hand, automatic = run_fit(tmp_path, ByHand), run_fit(tmp_path, Small)
    assert_quantized(by_hand)
    assert by_hand.losses == pytest.approx(automatic.losses, rel=1e-5)
    torch.testing.assert_close(flat(by_hand.model), flat(automatic.model))


class Adversaries(pl.LightningModule):
    """A generator and a discriminator with an optimizer each, as in Lightning's GAN example: forward is the generator alone."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        real = batch[0].flatten(1)
        one, two = self.optimizers()
        z = torch.randn(len(real), 4)
        self.toggle_optimizer(one)
        loss = F.softplus(-self.discriminator(self(z))).mean()
        self.manual_backward(loss)
        one.step()
        one.zero_grad()
        self.untoggle_optimizer(one)
        self.toggle_optimizer(two)
        other = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(self(z).detach())).mean()
        self.manual_backward(other)
        two.step()
        two.zero_grad()
        self.untoggle_optimizer(two)
        self.log_dict({"g": loss, "d": other})
        return {"loss": loss.detach()}

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), 1e-2) for part in (self.generator, self.discriminator)]


def test_several_optimizers_train_every_part_quantized(tmp_path: Path) -> None:
    run = run_fit(tmp_path, Adversaries)
    quantized = run.cco.quantized
    assert quantized.drift == []
    assert run.ranges.still == []
    assert sum(layer.weighted for layer in quantized.graph) == 4
    assert {quantized.graph[name].path.partition(".")[0] for name in quantized.weights} == {"generator", "discriminator"}
    # Float and quantized model drew the same noise: with another the outputs would have nothing in common.
    assert all(entry.relative < 0.2 for entry in run.cco.report.accumulated.values())
    plain = plain_losses(tmp_path, Adversaries)
    assert run.losses != plain
    assert run.losses == pytest.approx(plain, rel=0.1)
    assert_acts(run.cco, torch.randn(5, 4))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        pytest.param({"limit_train_batches": 3, "limit_val_batches": 1}, 3, id="limit_batches"),
        pytest.param({"limit_train_batches": 0.5, "limit_val_batches": 0.5}, 2, id="limit_share"),
        pytest.param({"limit_val_batches": 0}, 4, id="no_validation"),
        pytest.param({"overfit_batches": 1, "max_epochs": 3}, 3, id="overfit_batches"),
        pytest.param({"fast_dev_run": 2}, 2, id="fast_dev_run"),
        pytest.param({"max_steps": 3, "max_epochs": -1}, 3, id="max_steps"),
        pytest.param({"val_check_interval": 2}, 4, id="val_check_interval"),
        pytest.param({"check_val_every_n_epoch": 2, "max_epochs": 2}, 8, id="check_val_every_n_epoch"),
        pytest.param({"num_sanity_val_steps": 0}, 4, id="no_sanity_check"),
        pytest.param({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}, 8, id="reload_dataloaders"),
        pytest.param({"deterministic": True, "detect_anomaly": True}, 4, id="deterministic"),
        pytest.param({"enable_progress_bar": True, "enable_model_summary": True}, 4, id="progress_bar"),
    ],
)
def test_limits_and_switches_of_the_trainer(options: dict[str, Any], steps: int, tmp_path: Path) -> None:
    run = run_fit(tmp_path, Classifier, val=batches(), **options)
    assert len(run.losses) == steps
    # One batch again and again: the range of the input has nowhere to move.
    assert_quantized(run, unmoved=1 if "overfit_batches" in options else 0)


def test_barebones(tmp_path: Path) -> None:
    pl.seed_everything(1, verbose=False)
    cco = quick()
    trainer = pl.Trainer(barebones=True, max_epochs=1, accelerator="cpu", callbacks=[cco], default_root_dir=tmp_path)
    trainer.fit(Small(), batches())
    assert cco.report.local
    assert_acts(cco)
