"""Each recipe runs for a few steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hydra
import pytest

from lightning_cco import shipped_configs_dir

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", str(RECIPES / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_demo(tmp_path: Path) -> None:
    printed = run("digits_cnn.py", "--fast", "--output", str(tmp_path / "out"))
    for part in (
        "float",
        "INT8 (fake-quantized)",
        "6 of 7 layers with weights run in INT8 in ort (over 99 % of the multiplications)",
        "dropout",
        "tail",
        "Quantization Sensitivity",
        "tensorboard --logdir",
    ):
        assert part in printed
    written = {path.name for path in (tmp_path / "out" / "tensorboard" / "digits" / "cco").iterdir()}
    assert {"model_init.svg", "model_post_preprocessing.png", "heat_map.png", "suggested_skips.yaml", "resolved_recipe.yaml"} <= written


def test_char_transformer() -> None:
    printed = run("char_transformer.py", "--fast")
    assert "13 of 14 layers with weights run in INT8 in ort" in printed
    assert "its values are integers" in printed


def test_own_loop() -> None:
    assert "6 of 7 layers with weights run in INT8 in ort (over 99 % of the multiplications); frozen)" in run("own_loop.py", "--fast")


def test_lightning_cli() -> None:
    printed = run(
        "lightning_cli.py", "fit", "--trainer.callbacks+=lightning_cco.CCOCallback", "--trainer.callbacks.cfg=w8a8",
        "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.enable_progress_bar=false",
    )  # fmt: skip
    assert "# of Quantized Layers: 22" in printed


def test_hydra_app() -> None:
    import hydra_app

    overrides = ["cco@callbacks.cco.cfg=w4a8", "trainer.max_epochs=1", "+trainer.limit_train_batches=2", "trainer.default_root_dir=.",
                 "+trainer.enable_progress_bar=false"]  # fmt: skip
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(shipped_configs_dir())):
        config = hydra.compose("train", overrides=overrides)
    metrics = hydra_app.train(config)
    assert {"val_acc", "test_acc", "cco/qs_max"} <= set(metrics)
