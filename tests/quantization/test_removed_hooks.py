"""What is hooked on no model any more says so: the model computes in float, and a file or a measurement of it would be a float one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cco import CCOError, QuantizedModel, quantize


def quantized_net() -> tuple[QuantizedModel, Tensor]:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
    quantized = quantize(model.eval(), None, (x,))
    quantized.calibrate([x])
    return quantized, x


def removed(quantized: QuantizedModel) -> QuantizedModel:
    quantized.remove()
    return quantized


OFF: dict[str, Callable[[QuantizedModel], QuantizedModel]] = {"removed": removed, "a copy": copy.deepcopy}
USES: dict[str, Callable[[QuantizedModel, Tensor, Path], Any]] = {
    "calibrate": lambda quantized, x, folder: quantized.calibrate([x]),
    "sensitivity": lambda quantized, x, folder: quantized.sensitivity([x]),
    "loss_sensitivity": lambda quantized, x, folder: quantized.loss_sensitivity([x]),
    "onnx": lambda quantized, x, folder: quantized.export(folder / "model.onnx"),
    "pt2": lambda quantized, x, folder: quantized.export(folder / "model.pt2"),
}


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("use", USES)
def test_nothing_is_made_of_a_model_without_its_hooks(use: str, off: str, tmp_path: Path) -> None:
    quantized, x = quantized_net()
    with quantized.disabled():
        in_float = quantized.model(x)
    off_model = OFF[off](quantized)
    torch.testing.assert_close(off_model.model(x), in_float)
    with pytest.raises(CCOError, match=r"its hooks are off.*quantize\(\)"):
        USES[use](off_model, x, tmp_path)
    assert not list(tmp_path.iterdir())
    assert "hooks are off" in repr(off_model)


def test_the_state_of_one_without_hooks_goes_on_in_another() -> None:
    quantized, x = quantized_net()
    expected = quantized.model(x)
    again = quantize(removed(quantized).model, None, (x,))
    again.load_state_dict(quantized.state_dict())
    torch.testing.assert_close(again.model(x), expected)
