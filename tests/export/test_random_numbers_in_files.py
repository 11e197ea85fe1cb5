"""A forward that draws random numbers in evaluation: its file draws others, which is said, as the cause where the file differs too much for its check."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_cco import CCOError, quantize

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Noisy(nn.Module):
    def __init__(self, strength: float) -> None:
        super().__init__()
        self.first, self.second, self.last, self.strength = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), strength

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        if self.strength == 0.5:
            h = h + self.strength * torch.randn_like(h)
        y = self.last(torch.relu(self.second(h)))
        return y + self.strength * torch.randn_like(y) if 0 < self.strength < 0.5 else y


@pytest.mark.parametrize("strength", [0.0, 1e-6, 0.5])
def test_random_numbers_are_said(strength: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4, 8)
    quantized = quantize(Noisy(strength).eval(), None, (x,))
    quantized.calibrate([x])
    if strength == 0.5:
        with pytest.raises(CCOError, match=r"draws random numbers in evaluation, too \(RandomNormalLike in the file\).*if self.training"):
            quantized.export(tmp_path / "a.onnx")
        return
    report = quantized.export(tmp_path / "a.onnx")
    assert any("draws random numbers in every run (RandomNormalLike)" in note for note in report.notes) is bool(strength)
