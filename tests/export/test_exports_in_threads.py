"""Exports in several threads at once wait for each other: PyTorch's exporter changes functions of the whole process while it traces."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from export_case import run
from models import ResidualCNN

from lightning_cco import QuantizedModel, quantize


def calibrated(seed: int) -> QuantizedModel:
    torch.manual_seed(seed)
    x = torch.randn(8, 1, 8, 8)
    quantized = quantize(ResidualCNN().eval(), None, (x,))
    quantized.calibrate([x])
    return quantized


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_two_exports_at_once_are_both_right(tmp_path: Path) -> None:
    models = [calibrated(seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda number: models[number].export(tmp_path / f"{number}.onnx"), range(2)))
    models[0].export(tmp_path / "2.onnx")  # and the process is as it was
    x = torch.randn(4, 1, 8, 8)
    for number, quantized in enumerate([*models, models[0]]):
        with torch.no_grad():
            np.testing.assert_allclose(run(tmp_path / f"{number}.onnx", x), quantized.model(x).numpy(), atol=0.05)
