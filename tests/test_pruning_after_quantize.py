"""What is put on the weights of a quantized model later, such as pruning, changes no layer: weights are rounded as they are read, without a word."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_cco import quantize


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


LATER: dict[str, Callable[[nn.Module], object]] = {
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Halved()),
}


@pytest.mark.parametrize("how", LATER)
def test_weights_are_rounded_as_they_are_read(how: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)).eval(), torch.randn(32, 8)
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    quantized.freeze_ranges()
    LATER[how](model[2])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        rounded = model(x)
        weight = model[2].weight.detach().clone()
    assert quantized.drift == []
    with torch.no_grad():
        quantizer = quantized.weights["linear_1"][0]
        scale = weight.abs().amax(1) / 127
        wanted = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(16, dtype=torch.int32), 0, -127, 127)
        torch.testing.assert_close(quantizer(weight), wanted)
        plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
        for number in (0, 4):
            plain[number].load_state_dict(model[number].state_dict())
        plain[2].weight.copy_(weight)
        plain[2].bias.copy_(model[2].bias)
        reference = plain(x)
    assert float((rounded - reference).norm() / reference.norm()) < 0.05
