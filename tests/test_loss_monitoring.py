"""The loss sensitivity over a run: in the table, the picture, the heat map and the file; and skips by it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_modules import Classifier, batches, make_trainer, quick
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_cco import CCOError, draw_graph, load_settings
from lightning_cco.loss_sensitivity import LossSensitivityReport
from lightning_cco.suggestions import suggest_skips, suggestions_yaml

SHOWN: dict[str, Any] = {"training_settings": {"stats_steps": 2}, "monitoring_settings": {"draw_graph": False, "loss_sensitivity": True}}


def test_is_shown_each_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    callback, keeper = quick(**SHOWN), ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    trainer = make_trainer(tmp_path, callback, keeper, max_epochs=2, logger=TensorBoardLogger(tmp_path))
    with caplog.at_level("INFO"):
        trainer.fit(Classifier(), batches(), batches())
    assert "Expected rise of the loss by rounding each layer alone" in caplog.text
    folder, losses = Path(str(trainer.log_dir)) / "cco", callback.losses
    assert isinstance(losses, LossSensitivityReport)
    assert losses.loss == "loss"
    with (folder / "loss_sensitivity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["epoch"] for row in rows} == {"0", "1"}
    last = {(row["rounded"], row["layer"], int(row["bits"])): float(row["loss_rise"]) for row in rows if row["epoch"] == "1"}
    assert last == {(part, name, bits): pytest.approx(getattr(losses, part)[name][bits], rel=1e-6) for part, name, bits in losses.slopes}
    assert {row["bits"] for row in rows if row["planned"] == "1"} == {"8"}
    assert (folder / "loss_heat_map.png").stat().st_size > 1000
    events = EventAccumulator(str(trainer.log_dir))
    events.Reload()
    assert "cco-details/loss_heat_map" in events.Tags()["images"]
    assert "cco-loss/conv" in events.Tags()["scalars"]
    # A resumed run goes on with the file.
    resumed = quick(**SHOWN)
    again = make_trainer(tmp_path, resumed, max_epochs=3, logger=TensorBoardLogger(tmp_path))
    again.fit(Classifier(), batches(), batches(), ckpt_path=keeper.last_model_path)
    with (Path(str(again.log_dir)) / "cco" / "loss_sensitivity.csv").open(newline="") as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"0", "1", "2"}
    picture = draw_graph(callback.quantized.graph, callback.quantized.plan, rises={"conv": 0.0125}).to_string()  # type: ignore[union-attr]
    assert "expected rise of the loss 0.0125" in picture


def test_is_not_measured_unless_asked_for(tmp_path: Path) -> None:
    callback = quick()
    make_trainer(tmp_path, callback).fit(Classifier(), batches(), batches())
    assert callback.losses is None
    assert not (tmp_path / "cco" / "loss_sensitivity.csv").exists()


def test_skips_by_the_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    general = {"weights_num_bits": 2, "automatic_skip_by": "loss", "automatic_skip_quantization": True, "loss_sensitivity_threshold": 1e-6}
    callback = quick(global_quantization_settings=general)
    trainer = make_trainer(tmp_path, callback, max_epochs=2)
    with caplog.at_level("INFO"):
        trainer.fit(Classifier(), batches(), batches())
    found = callback.suggestions
    assert callback.quantized is not None
    skipped = set(callback.quantized.plan.suggestions)
    assert skipped
    assert "its expected rise of the loss was above the threshold" in caplog.text
    assert "expected: -" in caplog.text
    assert "% size of the weights" in caplog.text
    # What is left now is below the threshold, or was not in the first epoch.
    assert not skipped & {suggestion.name for suggestion in found}


def test_what_a_skip_wins_and_costs(tmp_path: Path) -> None:
    callback = quick(**SHOWN)
    make_trainer(tmp_path, callback).fit(Classifier(), batches(), batches())
    quantized, losses = callback.quantized, callback.losses
    assert quantized is not None
    assert losses is not None
    assert callback.report is not None
    settings = load_settings({"global_quantization_settings": {"automatic_skip_by": "loss", "loss_sensitivity_threshold": 0.0}})
    elements = {"conv": 100, "conv_1": 300}
    suggestions = {s.name: s for s in suggest_skips(callback.report, quantized.plan, settings, losses, elements)}
    rises = losses.rises(quantized.plan)
    assert suggestions["conv"].wins == pytest.approx(rises["conv"])
    assert suggestions["conv"].costs == pytest.approx(300 / 400)  # three more bytes for each weight
    assert next(iter(suggestions)) == max(suggestions, key=lambda name: rises.get(name, 0.0))
    text = suggestions_yaml(list(suggestions.values()))
    assert "+75 % size of the weights" in text
    load_settings_text = tmp_path / "suggested.yaml"
    load_settings_text.write_text(text)
    assert {rule.match for rule in load_settings(load_settings_text).layer_settings} == set(suggestions)


def test_says_what_skips_can_be_by() -> None:
    with pytest.raises(CCOError, match=r"automatic_skip_by: expected one of \['qs', 'loss'\]"):
        load_settings({"global_quantization_settings": {"automatic_skip_by": "lose"}})
