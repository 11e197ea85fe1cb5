"""Models that replace a module of theirs in a forward, as some do for sequences too short for their usual attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lightning_cco import quantize


class Mixer(nn.Module):
    """Mixes neighbours along the sequence."""

    def __init__(self, linear: nn.Linear, shift: int) -> None:
        super().__init__()
        self.linear, self.shift = linear, shift

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) + x.roll(self.shift, 1)


class Switching(nn.Module):
    """Changes over to another mixer for good once a sequence is short, in an attribute or in a list."""

    def __init__(self, listed: bool) -> None:
        super().__init__()
        self.table, self.first, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.mixer = Mixer(nn.Linear(8, 8), 1)
        self.mixers = nn.ModuleList([Mixer(nn.Linear(8, 8), 1), nn.Linear(8, 8)])
        self.listed, self.kind = listed, "long"

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] < 8 and self.kind == "long":
            self.kind = "short"
            if self.listed:
                self.mixers[0] = Mixer(self.mixers[0].linear, 3)
            else:
                self.mixer = Mixer(self.mixer.linear, 3)
        x = self.first(self.table(ids))
        for mixer in [self.mixer, *self.mixers]:
            x = mixer(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("listed", [False, True])
def test_an_export_leaves_modules_that_the_trial_of_other_sizes_replaces(listed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Switching(listed).eval()
    ids = torch.randint(0, 20, (2, 10))
    before = [(name, id(module)) for name, module in model.named_modules()]
    quantized = quantize(model, None, (ids,))
    quantized.calibrate([ids])
    wanted = quantized.model(ids)
    report = quantized.export(tmp_path / "model.onnx")
    assert not report.uncompared
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert torch.equal(quantized.model(ids), wanted)
    found = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"ids": ids.numpy()})[0]
    np.testing.assert_allclose(found, wanted.detach(), atol=1e-4)
