"""A layer made to resist quantization comes first, is suggested, and skipping what is suggested brings the accuracy back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import QUICK, Classifier, batches, make_trainer, quick
from models import GuideCNN, ResidualCNN
from omegaconf import OmegaConf

from lightning_cco import CCOCallback, QuantizedModel, quantize
from lightning_cco.settings import load_settings
from lightning_cco.suggestions import suggest_skips

RELATIVE = {"quantization_sensitivity_threshold": None, "quantization_sensitivity_relative_threshold": 0.5}
IMAGES = torch.cat([images for images, _ in batches(seed=5)])
ABSOLUTE = {"quantization_sensitivity_relative_threshold": None}  # the default QS: 10,000


class Still(Classifier):
    """Learns nothing: what changes is what quantization does."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


class OutlierWeights(Still):
    """Every row of one linear layer holds huge weights for inputs that are always 0: at 8 bits all the others round to nothing."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.net = GuideCNN()
        with torch.no_grad():
            self.net.conv2.bias[0] = -100.0
            self.net.fc1.weight[:, :4] = 1e4
            self.net.fc1.weight *= scale
            self.net.fc1.bias *= scale
            self.net.fc2.weight /= scale


class OutlierActivation(Still):
    """One channel of an activation is huge and read by nobody: at 8 bits all the others round to nothing, whatever the weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = GuideCNN()
        with torch.no_grad():
            self.net.conv1.weight *= 1e4
            self.net.conv1.bias *= 1e4
            self.net.conv1.bias[0] = 1e9
            self.net.conv2.weight[:, 0] = 0.0
            self.net.conv2.weight /= 1e4


def agreement(quantized: QuantizedModel, images: torch.Tensor) -> float:
    """Share of images that the quantized model classifies as the float model does."""
    model = quantized.model.eval()
    with torch.no_grad():
        found = model(images).argmax(-1)
        with quantized.disabled():
            return float((found == model(images).argmax(-1)).float().mean())


def lost(quantized: QuantizedModel, images: torch.Tensor) -> float:
    """What quantization changes in the logits, in shares of how they vary over the images."""
    with torch.no_grad():
        found = quantized.model.eval()(images)
        with quantized.disabled():
            expected = quantized.model(images)
    return float(torch.dist(found, expected) / torch.dist(expected, expected.mean(0, keepdim=True).expand_as(expected)))


@pytest.mark.parametrize(
    ("scale", "general", "reason"),
    [
        pytest.param(1.0, RELATIVE, "relative error", id="relative"),
        pytest.param(1e4, ABSOLUTE, "is above 10,000 (rounding the weights to 8 bits)", id="absolute"),
    ],
)
def test_outlier_weights_come_first_and_merging_the_suggestion_helps(
    scale: float, general: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    cco = quick(global_quantization_settings=general)
    make_trainer(tmp_path, cco).fit(OutlierWeights(scale), batches())
    assert cco.report.worst_first()[0].name == "linear"
    assert [suggestion.name for suggestion in cco.suggestions] == ["linear"]
    assert reason in cco.suggestions[0].reason
    before = agreement(cco.quantized, IMAGES)
    merged = OmegaConf.merge({**QUICK}, OmegaConf.load(tmp_path / "cco" / "suggested_skips.yaml"))
    again = CCOCallback(merged)
    torch.manual_seed(0)
    make_trainer(tmp_path, again).fit(OutlierWeights(scale), batches())
    assert again.quantized.plan.skipped["linear"].startswith("setting")
    assert before < 0.8
    assert agreement(again.quantized, IMAGES) > 0.95


def test_an_output_that_resists_takes_its_group_and_its_readers_along(tmp_path: Path) -> None:
    """Skipping the layer alone would change nothing: its readers run in INT8 and have their input rounded."""
    once, cco = (quick(global_quantization_settings={"automatic_skip_quantization": True}) for _ in range(2))
    for callback, epochs in ((once, 1), (cco, 3)):
        torch.manual_seed(0)
        make_trainer(tmp_path, callback, max_epochs=epochs).fit(OutlierActivation(), batches())
    assert [suggestion.name for suggestion in once.suggestions] == ["relu", "conv", "conv_1"]
    assert "reads the output of 'relu'" in once.suggestions[2].reason
    assert agreement(once.quantized, IMAGES) < 0.8
    assert agreement(cco.quantized, IMAGES) > 0.9
    assert cco.suggestions == []  # it came to an end
    assert cco.quantized.plan.suggestions == ("relu", "conv", "conv_1")
    assert {"linear", "relu_2"} <= cco.quantized.plan.quantized
    assert "relu_1" in cco.quantized.plan.tensors  # a clamp between a float layer and an INT8 one: its result alone is rounded


def test_a_batch_norm_that_resists_is_skipped_though_its_convolution_could_take_it_in() -> None:
    model = ResidualCNN().eval()
    with torch.no_grad():
        model.blocks[0].bn2.weight *= 1e5
        model.blocks[1].conv1.weight[:, 0] = 0.0
        model.blocks[0].bn2.bias[0] = 1e9  # one huge channel, read by nobody
        model.fc.weight /= 1e5
        model.fc.weight[:, 0] = 0.0
    quantized = quantize(model, None, (IMAGES,))
    quantized.calibrate([(IMAGES,)])
    before, skips = lost(quantized, IMAGES), []
    for _ in range(5):
        report = quantized.sensitivity([(IMAGES,)])
        found = suggest_skips(report, quantized.plan, quantized.settings)
        assert not {suggestion.name for suggestion in found} & set(skips)
        if not found:
            break
        skips += [suggestion.name for suggestion in found]
        new = quantized.replan(suggestions=skips)
        if new:
            quantized.calibrate([(IMAGES,)], only=new)
        assert not quantized.plan.quantized & set(skips)
    assert found == []
    assert {"batch_norm_2", "conv_2", "add"} <= set(skips)
    assert {"conv", "conv_1"} & set(skips) == set()
    assert before > 0.5
    assert lost(quantized, IMAGES) < 0.1


def test_automatic_skips_are_applied_at_the_next_epoch_shown_and_survive_a_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    general = {**RELATIVE, "automatic_skip_quantization": True}
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    cco = quick(global_quantization_settings=general, monitoring_settings={"draw_graph": True})
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer(tmp_path, cco, checkpoint, max_epochs=2).fit(OutlierWeights(), batches())
    assert cco.quantized.plan.skipped["linear"].startswith("suggestion")
    assert "Automatic Quantization: skipping" in caplog.text
    assert "Not quantized (suggestion: its Quantization Sensitivity was above the threshold): linear" in caplog.text
    assert "its Quantization Sensitivity" in (tmp_path / "cco" / "model_post_preprocessing.svg").read_text()
    for name in ("suggested_skips.yaml", "resolved_recipe.yaml"):
        said = {rule.match: rule.skip_quantization for rule in load_settings(tmp_path / "cco" / name).layer_settings}
        assert said["linear"] is True
    resumed = quick(global_quantization_settings=general)
    make_trainer(tmp_path, resumed, max_epochs=3).fit(OutlierWeights(), batches(), ckpt_path=checkpoint.last_model_path)
    assert "linear" in resumed.quantized.plan.skipped


def test_a_layer_that_a_rule_keeps_is_not_suggested(tmp_path: Path) -> None:
    cco = quick(global_quantization_settings=RELATIVE, layer_settings=[{"match": "linear", "skip_quantization": False}])
    make_trainer(tmp_path, cco).fit(OutlierWeights(), batches())
    assert cco.report.worst_first()[0].name == "linear"
    assert cco.suggestions == []
