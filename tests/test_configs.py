"""The shipped Hydra configs compose, and are found wherever the package is installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import hydra
import pytest
from hydra.utils import instantiate

from lightning_cco import CCOCallback, shipped_configs_dir
from lightning_cco._recipes import shipped_recipes

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("recipe", sorted(shipped_recipes()))
def test_each_recipe_is_chosen_by_its_group(recipe: str) -> None:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(shipped_configs_dir())):
        config = hydra.compose("train", overrides=[f"cco@callbacks.cco.cfg={recipe}", "callbacks.cco.cfg.training_settings.stats_steps=7"])
    callback = instantiate(config.callbacks.cco)
    assert isinstance(callback, CCOCallback)
    assert callback.settings.training_settings.stats_steps == 7
    assert callback.settings.global_quantization_settings.weights_num_bits == int(recipe[1])


@pytest.mark.slow
def test_the_wheel_carries_the_configs(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert "lightning_cco/configs/cco/w8a8.yaml" in names
    assert "lightning_cco/configs/callbacks/cco.yaml" in names
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "own.yaml").write_text("defaults: [callbacks: cco]\nhydra: {searchpath: ['pkg://lightning_cco.configs']}\n")
    code = f"""
import hydra
import lightning_cco as cc

print(cc.shipped_configs_dir(), cc.load_settings("w4a8").global_quantization_settings.weights_num_bits)
with hydra.initialize_config_dir(version_base="1.3", config_dir={str(tmp_path / "conf")!r}):
    config = hydra.compose("own", overrides=["cco@callbacks.cco.cfg=w4a4"])
print(config.callbacks.cco.cfg.global_quantization_settings.activations_num_bits)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error:provider=hydra.searchpath", "-c", code],  # Hydra warns of a path that it can't find
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
    )
    assert done.stdout.split() == [str(tmp_path / "installed" / "lightning_cco" / "configs"), "4", "4"]
