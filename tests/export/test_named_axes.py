"""Axes after the batch that a user names: the file is run at other sizes along them, and is none where it is wrong there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import CCOError, QuantizedModel, quantize

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
DIM = torch.export.Dim
TIME = {"dynamic_axes": {"x": {0: "batch", 2: "time"}}}


class Signal(nn.Module):
    """A convolutional net on signals of any length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv1d(4, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 3)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(2))


class Windowed(Signal):
    """The largest value of its window, and with it the window's scale, depends on the length."""

    def forward(self, x: Tensor) -> Tensor:
        window = F.interpolate(torch.linspace(0, 1, 16)[None, None], size=x.shape[2])
        return self.head((self.features(x) * window).mean(2))


class Strict(Signal):
    """Refuses in use what it lets pass while it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and x.shape[2] != 16:
            raise ValueError("16 values were expected")
        return super().forward(x)


class Flat(Signal):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class Long(Signal):
    """Computes something else on long signals."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, ::2] * 2 if x.shape[2] > 20 else x)


def calibrated(model: nn.Module) -> tuple[QuantizedModel, Tensor]:
    x = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(0))
    quantized = quantize(model.eval(), None, (x,))
    quantized.calibrate([x])
    return quantized, x


def test_a_file_that_is_wrong_at_another_size_is_none(tmp_path: Path) -> None:
    quantized, x = calibrated(Windowed())
    with pytest.raises(
        CCOError, match=r"with 'x' of the sizes \[4, 4, 8\] instead of \[4, 4, 16\], the file differs .*Leave it out of the axes"
    ):
        quantized.export(tmp_path / "model.onnx", (x,), **TIME)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["model.onnx", "model.pt2"])
def test_an_axis_along_which_the_model_takes_no_other_size_is_named(file: str, tmp_path: Path) -> None:
    quantized, x = calibrated(Strict())
    with pytest.raises(CCOError, match=r"axis 2 of 'x' was to vary, but Strict took no other size there than 16"):
        quantized.export(tmp_path / file, (x,), dynamic_shapes={"x": {0: "batch", 2: "time"}})
    assert not list(tmp_path.iterdir())


def test_an_axis_that_the_model_fixes_is_named(tmp_path: Path) -> None:
    quantized, x = calibrated(Flat())
    with pytest.raises(CCOError, match=r"You marked axis 2 of 'x' as dynamic but your code specialized it to be a constant \(16\)"):
        quantized.export(tmp_path / "model.onnx", (x,), **TIME)
    with pytest.raises(CCOError, match=r"axis 2 of 'x' was to vary, but Flat took no other size there than 16"):
        quantized.export(tmp_path / "model.onnx", (x,), dynamic_shapes={"x": {0: "batch", 2: DIM.AUTO}})


def test_sizes_beyond_the_limits_of_an_axis_are_not_tried(tmp_path: Path) -> None:
    quantized, x = calibrated(Long())
    report: Any = quantized.export(tmp_path / "model.onnx", (x,), dynamic_shapes={"x": {2: DIM("time", min=14, max=20)}})
    assert "sizes within which the file holds: axis 2 of 'x' 14 at least and 20 at most" in report.notes
    assert report.inputs == {"x": [4, 4, "time"]}
