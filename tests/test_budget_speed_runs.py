"""A speed as the budget of a run: by a table that was measured before, shown, kept in checkpoints, and refused early where nothing can be measured."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from brute_force import images
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_modules import Classifier, batches, make_trainer, quick
from models import ResidualCNN
from PIL import Image
from test_budget import bits_of
from test_budget_runs import judged
from test_budget_speed import table_for
from torch.utils.data import DataLoader, TensorDataset

from lightning_cco import CCOError, CCOWarning, capture_graph, load_layer_times, load_settings
from lightning_cco.budget.plan import BudgetPlan
from lightning_cco.export.engine_patterns import adds_products_exactly
from lightning_cco.layer_timing import engine_name

pytestmark = pytest.mark.filterwarnings("ignore:budget_settings.layer_times. the table was measured elsewhere")


def table_in(folder: Path) -> str:
    """A table of a machine whose INT8 is five times as fast, for the networks of these tests."""
    path = folder / "times.json"
    graph = capture_graph(ResidualCNN(width=12), ResidualCNN.example())
    table_for(graph.names, 7, (0.15, 0.25), 0.05).save(path)
    return str(path)


def test_what_it_shows(tmp_path: Path) -> None:
    callback = quick(budget_settings={"speed": 2.5, "layer_times": table_in(tmp_path)})
    trainer = make_trainer(tmp_path, callback, logger=TensorBoardLogger(tmp_path))
    trainer.fit(Classifier(), batches(), batches())
    budget = callback.budget
    assert budget is not None
    assert budget.chosen.speed >= 2.5
    folder = Path(str(trainer.log_dir)) / "cco"
    assert load_layer_times(folder / "layer_times.json") == load_layer_times(tmp_path / "times.json")
    with (folder / "budget.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert any("µs" in row["reason"] for row in rows)
    written = json.loads((folder / "budget.json").read_text())
    assert written["speed_limit"] == 2.5
    assert all(point["speed"] > 0 for point in [*written["curve"], *written["speed_curve"], *written["uniform"]])
    picture = np.asarray(Image.open(folder / "trade_off.png"))
    assert picture.shape[1] == 2 * 760  # against the size, and against the speed
    assert (picture[:, 760:] == (198, 40, 40)).all(-1).sum() > 50
    recipe = (folder / "resolved_recipe.yaml").read_text()
    assert f"# Predicted speed {budget.chosen.speed:.3g} times" in recipe
    assert "µs" in recipe
    load_settings(folder / "resolved_recipe.yaml")
    data = json.loads((folder / "report.json").read_text())
    assert data["speed"]["float_seconds"] == pytest.approx(budget.float_seconds, rel=1e-4)
    # Its tensors are converted where it says so: the model is planned as the choice was.
    assert {entry.layer for entry in budget.layers if entry.form == "INT8"} <= callback.quantized.plan.quantized  # type: ignore[union-attr]


def test_resumes_and_is_revised_by_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table_in(tmp_path)
    goal = {"speed": 2.0, "revise_every_n_epochs": 2}
    first = quick(budget_settings={**goal, "layer_times": path})
    keeper = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    make_trainer(tmp_path, first, keeper).fit(Classifier(), batches(), batches())
    table = load_layer_times(path)
    again = quick(budget_settings={**goal, "layer_times": path})
    make_trainer(tmp_path, again, max_epochs=2).fit(Classifier(), batches(), batches(), ckpt_path=keeper.last_model_path)
    assert again.budget is None
    assert bits_of(again) == bits_of(first)
    # Without the file: the table of the checkpoint, and nothing is measured.
    monkeypatch.setattr("lightning_cco.budget_run.FileTimer", lambda *args: pytest.fail("measured"))
    found: list[BudgetPlan] = []
    monkeypatch.setattr("lightning_cco.monitoring.monitor.Monitor.on_budget", lambda self, budget, step: found.append(budget))
    moved = quick(budget_settings=goal)
    make_trainer(tmp_path, moved, max_epochs=3).fit(Classifier(), batches(), batches(), ckpt_path=keeper.last_model_path)
    assert found
    assert all(plan.times == table for plan in found)


def test_within_an_accuracy_drop_the_fastest_or_one_that_is_fast_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_cco.budget_run.exported_bytes", lambda *args: 20_000)  # an export takes seconds
    model, loader = judged(tmp_path)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    path, speeds = table_in(tmp_path), []
    for goal in ({"accuracy_drop_by": "speed"}, {"speed": 3.0}):
        model.load_state_dict(weights)
        callback = quick(budget_settings={"accuracy_drop": 0.05, "metric": "val_acc", "layer_times": path, **goal})
        make_trainer(tmp_path, callback, limit_train_batches=1).fit(model, loader, loader)
        assert callback.budget is not None
        speeds.append(callback.budget.chosen.speed)
        assert callback.original_metrics["val_acc"] - callback.calibrated_metrics["val_acc"] <= 0.05
        tried = {float(at): lost for at, lost in callback.budget.metric.items()}
        if "speed" not in goal:  # the fastest of those that were validated and lose no more
            assert callback.budget.chosen.speed == pytest.approx(max(at for at, lost in tried.items() if lost <= 0.05), abs=1e-4)
    assert speeds[1] >= 3.0
    assert speeds[0] >= speeds[1] * 0.999


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"deployment_settings": {"target_framework": "tensorrt"}}, "measured in ONNX Runtime, and the model is for TensorRT.*layer_times"),
        ({"deployment_settings": {"target_framework": "executorch"}}, "the model is for ExecuTorch.*layer_times"),
        ({"deployment_settings": {"vnni": not adds_products_exactly()}}, "vnni: .* writes files for other processors than this one"),
        ({"budget_settings": {"speed": 2, "layer_times": "nowhere.json"}}, "layer_times: there is no file 'nowhere.json'"),
    ],
)
def test_says_before_the_training_that_nothing_can_be_measured(recipe: dict[str, Any], said: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quick(**{"budget_settings": {"speed": 2}, **recipe}))
    with pytest.raises(CCOError, match=said):
        trainer.fit(Classifier(), batches())
    assert trainer.global_step == 0


@pytest.mark.filterwarnings("default:budget_settings.layer_times. the table was measured elsewhere")
def test_a_table_of_another_engine_is_a_warning(tmp_path: Path) -> None:
    loader: DataLoader[Any] = DataLoader(TensorDataset(*images(64)), 16)
    callback = quick(budget_settings={"speed": 2, "layer_times": table_in(tmp_path)})
    with pytest.warns(CCOWarning, match=f"measured elsewhere .*engine: a made-up engine, here {engine_name()}"):
        make_trainer(tmp_path, callback, limit_train_batches=1).fit(Classifier(), loader, loader)
    torch.manual_seed(0)


def test_a_size_for_an_engine_with_files_of_its_own_says_what_it_is_of(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"deployment_settings": {"target_framework": "executorch"}, "budget_settings": {"size": 0.5}}
    trainer = make_trainer(tmp_path, quick(**recipe))
    with pytest.warns(CCOWarning, match=r"sizes are those of ONNX files, .* those of \.pte files for ExecuTorch differ"):
        quick(**recipe).setup(trainer, Classifier(), "fit")
