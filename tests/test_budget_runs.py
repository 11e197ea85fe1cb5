"""A budget over a run: validated, revised, shown, and the same on all processes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from brute_force import images
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_modules import Classifier, batches, make_trainer, quick
from models import ResidualCNN
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_cco import CCOError
from lightning_cco.budget.plan import BudgetPlan, LayerChoice, Point
from lightning_cco.budget_run import lost_of
from lightning_cco.monitoring import trade_off as trade_off_module
from lightning_cco.monitoring.trade_off import budget_csv, budget_lines, trade_off


class Judged(Classifier):
    """A classifier whose validation tells its accuracy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResidualCNN(width=12)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        scores = self(batch[0])
        self.log("val_acc", (scores.argmax(1) == batch[1]).float().mean())
        self.log("val_loss", F.cross_entropy(scores, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def judged(folder: Path) -> tuple[Judged, DataLoader[Any]]:
    """One that has learned something."""
    torch.manual_seed(0)
    loader: DataLoader[Any] = DataLoader(TensorDataset(*images(512)), 64)
    model = Judged()
    make_trainer(folder, max_epochs=3).fit(model, loader, loader)
    return model, loader


def test_the_smallest_plan_within_an_accuracy_drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_cco.budget_run.exported_bytes", lambda *args: 20_000)  # an export takes seconds
    model, loader = judged(tmp_path)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    callback = quick(budget_settings={"accuracy_drop": 0.03, "metric": "val_acc"})
    trainer = make_trainer(tmp_path, callback, limit_train_batches=1)
    trainer.fit(model, loader, loader)
    budget = callback.budget
    assert budget is not None
    assert budget.metric
    kept = {size: lost for size, lost in budget.metric.items() if lost <= 0.03}
    assert f"{min(map(float, kept)):.4f}" in kept
    # What was validated is what the Trainer finds for the float weights under this plan.
    lost = callback.original_metrics["val_acc"] - callback.calibrated_metrics["val_acc"]
    assert lost == pytest.approx(kept[min(kept, key=float)], abs=1e-6)
    assert lost <= 0.03
    assert trainer.global_step == 1
    assert weights.keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("original", "now", "said"),
    [
        ({"val_loss": 1.0}, {"val_loss": 1.0}, "the validation of the float model logged no 'val_acc'. There were: val_loss"),
        ({"val_acc": 1.0}, {}, "of the compressed model logged no 'val_acc'. Nothing was logged"),
        ({"val_acc": 1.0}, {"val_acc": 1.0}, "whether more of 'val_acc' is better is not known"),
    ],
)
def test_says_what_is_missing_of_a_metric(original: dict[str, float], now: dict[str, float], said: str) -> None:
    with pytest.raises(CCOError, match=said):
        lost_of("val_acc", original, now, {})
    assert lost_of("val_loss", {"val_loss": 1.0}, {"val_loss": 1.5}, {"val_loss": "min"}) == 0.5


def test_accuracy_drop_needs_validations(tmp_path: Path) -> None:
    callback = quick(budget_settings={"accuracy_drop": 0.1, "metric": "val_acc"}, training_settings={"skip_initial_evaluation": True})
    with pytest.raises(CCOError, match="skip_initial_evaluation: true leaves it unknown"):
        make_trainer(tmp_path, callback).fit(Judged(), batches(), batches())
    callback = quick(budget_settings={"accuracy_drop": 0.1, "metric": "val_acc"})
    with pytest.raises(CCOError, match="fast_dev_run"):
        make_trainer(tmp_path, callback, fast_dev_run=True).fit(Judged(), batches(), batches())


def test_is_revised_at_the_start_of_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = quick(budget_settings={"average_bits": 4.6, "revise_every_n_epochs": 2})
    found: list[tuple[int, BudgetPlan]] = []
    on_budget = "lightning_cco.monitoring.monitor.Monitor.on_budget"
    trainer = make_trainer(tmp_path, callback, max_epochs=5)
    monkeypatch.setattr(on_budget, lambda self, budget, step: found.append((trainer.current_epoch, budget)))
    trainer.fit(Judged(), batches(), batches())
    assert [epoch for epoch, _ in found] == [0, 2, 4]
    assert all(plan.chosen.average_bits <= 4.6 for _, plan in found)
    assert found[0][1].chosen.rise != found[-1][1].chosen.rise
    assert callback.quantized is not None
    assert not callback.quantized.uncalibrated


def test_what_it_shows(tmp_path: Path) -> None:
    callback = quick(budget_settings={"average_bits": 4.6})
    trainer = make_trainer(tmp_path, callback, logger=TensorBoardLogger(tmp_path))
    trainer.fit(Judged(), batches(), batches())
    folder = Path(str(trainer.log_dir)) / "cco"
    with (folder / "budget.csv").open(newline="") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    assert callback.quantized is not None
    for name, row in rows.items():
        assert int(row["weights_num_bits"]) == (callback.quantized.plan.decisions[name].weights_num_bits or 32)
        assert row["reason"]
    written = json.loads((folder / "budget.json").read_text())
    assert {point["name"] for point in written["uniform"]} == {"W8A8", "W4A8", "W4A4"}
    # No plan of the curve takes more and loses more than another.
    curve = sorted((point["average_bits"], point["rise"]) for point in written["curve"])
    assert len(curve) > 4
    assert [rise for _, rise in curve] == sorted((rise for _, rise in curve), reverse=True)
    for point in written["uniform"]:  # the best within as many bits or more loses no more
        assert all(rise <= point["rise"] * 1.0001 for bits, rise in curve if bits >= point["average_bits"])
    picture = np.asarray(Image.open(folder / "trade_off.png"))
    for colour in ((24, 66, 122), (198, 40, 40), (35, 147, 74)):
        assert (picture == colour).all(-1).sum() > 50
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    assert "cco/2_trade_off" in events.Tags()["images"]
    assert "cco/4_budget/text_summary" in events.Tags()["tensors"]


@pytest.mark.parametrize("chosen", [0.12, 0.2, 0.25, 0.39])
def test_labels_of_the_trade_off_are_in_the_frame_and_apart(chosen: float, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float, float, float]] = []
    free = trade_off_module._free_box
    monkeypatch.setattr(trade_off_module, "_free_box", lambda *args: drawn.append(free(*args)) or drawn[-1])
    curve = [Point("", 10 ** (-step / 3), 0.12 + 0.03 * step, 8.0, 0.1) for step in range(10)]
    uniform = [Point("W8A8", 10**-2.3, 0.30, 8, 0.2), Point("W4A8", 0.1, 0.19, 4, 0.2), Point("W4A4", 1.0, 0.19, 4, 0.2)]
    trade_off(BudgetPlan("size", 0.2, [], {}, [], Point("chosen", 10 ** (-(chosen - 0.12) * 11), chosen, 4.0, 0.1), curve, uniform))
    assert len(drawn) == 4
    for number, (left, top, right, bottom) in enumerate(drawn):
        assert 90 < left < right < 730
        assert 44 < top < bottom < 384
        for other in drawn[:number]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_hostile_names_and_figures() -> None:
    point = Point("chosen", 0.0, 1e-12, 0.0, float("inf"))
    layer = LayerChoice("=1+1\x1b[31m|<script>", "INT8", 8, 8, 1.0, float("nan"), "a\nb")
    plan = BudgetPlan("size", 0.5, [layer] * 50, {}, [], point, [], [point])
    trade_off(plan)
    assert "'=1+1" in budget_csv(plan)
    assert "\x1b" not in budget_csv(plan)
    assert "and 10 more" in budget_lines(plan)[-1]


class Noisy(Judged):
    """Batch norms whose statistics move, and random numbers, in each training step."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.log("drawn", torch.rand(()))
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    "recipe", [{"budget_settings": {"average_bits": 4.6}}, {"monitoring_settings": {"draw_graph": False, "loss_sensitivity": True}}]
)
def test_measuring_changes_nothing_of_the_training(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of batch norms and random numbers before and after the first epoch's end are those of a run without."""

    class Watch(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
            if trainer.global_step in (0, 4):
                self.seen += [torch.get_rng_state(), batch[0].clone()]
            if trainer.global_step == 0:
                self.seen += [pl_module.net.bn.running_mean.clone(), pl_module.net.bn.num_batches_tracked.clone()]

    watches = []
    for settings in ({}, recipe):
        torch.manual_seed(0)
        watches.append(Watch())
        make_trainer(tmp_path, quick(**settings), watches[-1], max_epochs=2).fit(Noisy(), batches(), batches())
    for one, two in zip(watches[0].seen, watches[1].seen, strict=True):
        assert torch.equal(one, two)
