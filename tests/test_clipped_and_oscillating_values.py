"""Shares of clipped values and of oscillating weights, against counts by hand."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_modules import Classifier, batches, make_trainer, quick
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_cco import CCOCallback, QuantizedModel, quantize
from lightning_cco.level_use import LayerLevels, LevelWatch
from lightning_cco.monitoring.tables import levels_lines, levels_rows

FEW = {"weights_num_bits": 2, "activations_num_bits": 2, "skip_tail_quantization": False}


def small() -> tuple[QuantizedModel, torch.Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(64, 6)
    quantized = quantize(model, {"global_quantization_settings": FEW}, (x,))
    quantized.calibrate([x])
    return quantized, x


def test_clipped_shares_are_those_counted_by_hand() -> None:
    quantized, x = small()
    levels = LevelWatch().measure(quantized, lambda: quantized.model(x))
    for name, weight in (("linear", quantized.model[0].weight), ("linear_1", quantized.model[2].weight)):
        (quantizer,) = quantized.weights[name]
        unbounded = (weight / quantizer.scale(weight)).round()
        assert levels[name].clipped_weights == pytest.approx(float((unbounded.abs() > 1).float().mean()))
        assert levels[name].clipped_weights > 0
        assert math.isnan(levels[name].oscillating_weights)
    with quantized.evaluating():
        rounded = quantized.weights["linear"][0](quantized.model[0].weight)
        features = torch.relu(nn.functional.linear(quantized.activations["input_0"](x), rounded, quantized.model[0].bias))
    relu = quantized.activations["relu"]
    beyond = features > 3.5 * relu.scale  # four levels from 0 on
    assert levels["relu"].clipped_activations == pytest.approx(float(beyond.float().mean()))
    assert 0 < levels["relu"].clipped_activations < 0.5


def test_a_weight_that_comes_back_to_its_level_oscillates() -> None:
    quantized, x = small()
    watch, weight = LevelWatch(), quantized.model[2].weight
    with torch.no_grad():
        weight.copy_(torch.tensor([1.0, -1.0]).repeat(32).view(8, 8))
    shares = []
    for sign in (1.0, -1.0, 1.0, 1.0):
        with torch.no_grad():
            weight[0, :4] = sign * torch.tensor([1.0, -1.0, 1.0, -1.0])
        shares.append(watch.measure(quantized, lambda: quantized.model(x))["linear_1"].oscillating_weights)
    assert all(math.isnan(share) for share in shares[:2])
    assert shares[2:] == [pytest.approx(4 / 64), 0.0]


def test_only_shares_worth_a_line_are_in_the_log() -> None:
    levels = {"conv": LayerLevels(0.0, math.nan, 0.001), "conv_1": LayerLevels(0.02, 0.1, math.nan)}
    assert levels_rows(levels)[0] == ["conv_1", "2.00%", "10.00%", "-"]
    assert "conv_1" in levels_lines(levels)[2]
    assert levels_lines({"conv": levels["conv"]}) == []


def test_a_training_shows_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cco = quick(global_quantization_settings={"weights_num_bits": 2, "activations_num_bits": 2})
    module = Classifier()
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, cco, logger=TensorBoardLogger(tmp_path), max_epochs=3).fit(module, batches())
    assert "weights oscillating" in caplog.text
    assert not math.isnan(cco.levels["conv_1"].oscillating_weights)
    events = EventAccumulator(str(next(tmp_path.rglob("version_0"))))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert any(tag.startswith("cco-clipped_activations/") for tag in tags)
    assert len(events.Scalars("cco-clipped_weights/conv_1")) == 3
    assert len(events.Scalars("cco-oscillating_weights/conv_1")) == 1
    assert module.training


class Growing(Callback):
    """Makes the weights of the first convolution ten times as large, after the calibration."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == 2:
            layer = next(module for module in pl_module.modules() if isinstance(module, nn.Conv2d))
            norms = [module for module in pl_module.modules() if isinstance(module, nn.BatchNorm2d)]
            with torch.no_grad():
                for tensor in (layer.weight, *(norm.weight for norm in norms)):
                    tensor.mul_(self.factor)


def grown(folder: Path, factor: float, range_estimator: str = "auto", bits: int = 4) -> list[str]:
    cco = CCOCallback(
        {
            "global_quantization_settings": {"weights_num_bits": bits, "activations_num_bits": bits},
            "training_settings": {"stats_steps": 2, "range_estimator": range_estimator},
            "monitoring_settings": {"draw_graph": False},
        }
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(folder, cco, Growing(factor), max_epochs=1).fit(Classifier(), batches())
    return [str(warning.message) for warning in caught if "are clipped" in str(warning.message)]


def test_ranges_that_stayed_behind_are_named_at_the_end(tmp_path: Path) -> None:
    (said,) = grown(tmp_path, 10.0)
    assert "'relu" in said or "'add" in said
    assert "range_estimator: moving_average" in said


def test_nothing_is_said_of_ranges_that_fit_or_follow(tmp_path: Path) -> None:
    assert grown(tmp_path, 1.0) == []
    assert grown(tmp_path, 1.0, bits=2) == []
    assert grown(tmp_path, 10.0, range_estimator="moving_average") == []
