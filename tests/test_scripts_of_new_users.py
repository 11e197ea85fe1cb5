"""A user's first hour: five training scripts as people write them, and one line more."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from lightning_cco import CCOCallback

sys.path.insert(0, str(Path(__file__).parent / "user_scripts"))

# The weighted layers that stay in float: tails only.
SCRIPTS = {
    "autoencoder": {"linear_3"},
    "image_classifier": {"linear"},
    "bert_finetuning": {"linear_13"},
    "gan": {"linear_4"},  # the generator's last layer is read by the discriminator
    "time_series": {"linear"},
}


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*The number of training batches")
@pytest.mark.parametrize("script", SCRIPTS)
def test_one_line_more(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cco = CCOCallback()
    trainer = importlib.import_module(script).main([cco], accelerator="cpu", devices=1, limit_train_batches=4, limit_val_batches=2)
    quantized = cco.quantized
    assert quantized.drift == []
    weighted = {layer.name for layer in quantized.graph if layer.weighted}
    assert weighted - quantized.plan.quantized - quantized.plan.weight_only == SCRIPTS[script]
    assert all(quantized.plan.skipped[name].startswith("tail") for name in SCRIPTS[script])
    assert cco.report.local
    assert set(cco.original_metrics) <= set(trainer.callback_metrics) | {"val_loss", "val_acc"}
    written = {path.name for path in next(tmp_path.rglob("cco")).iterdir()}
    assert {"model_init.svg", "model_post_preprocessing.png", "heat_map.png", "resolved_recipe.yaml", "suggested_skips.yaml"} <= written
