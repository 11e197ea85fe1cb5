"""OpenVINO does not stay in the process that exports: forks and further processes would end in a crash there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import subprocess, sys, warnings
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import lightning_cco as cc

warnings.simplefilter("ignore")
model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval(), torch.randn(4, 3, 8, 8)
quantized = cc.quantize(model, {"deployment_settings": {"target_framework": "openvino"}}, (x,))
quantized.calibrate([x])
report = quantized.export("model.onnx", (x,))
assert report.target.startswith("OpenVINO") and report.target_nodes
assert "openvino" not in sys.modules
for _ in range(3):
    list(DataLoader(TensorDataset(x), 2, num_workers=2))
for _ in range(5):
    subprocess.run([sys.executable, "-c", "pass"], check=True)
"""


def test_training_goes_on_after_an_export(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
