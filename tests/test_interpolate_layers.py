"""Interpolations: to the nearest they pick values, which stay on their grid; others compute new ones, in float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_cco as cc

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own

aten = torch.ops.aten
NEAREST: dict[str, Any] = {
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0),
    "size": lambda x: F.interpolate(x, size=(12, 9)),
    "exact": lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "module": nn.Upsample(scale_factor=2),
    "aten": lambda x: aten.upsample_nearest2d.default(x, [12, 12], None, None),
    "aten exact": lambda x: aten._upsample_nearest_exact2d.default(x, [12, 12], None, None),
}
OTHERS: dict[str, Any] = {
    "bilinear": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "module": nn.UpsamplingBilinear2d(scale_factor=2),
    "aten": lambda x: aten.upsample_bilinear2d.default(x, [12, 12], False, None, None),
    "python": lambda x: torch._C._nn.upsample_bilinear2d(x, (12, 12), False),
    "bicubic": lambda x: aten.upsample_bicubic2d.default(x, [12, 12], False, None, None),
    "anti-aliased": lambda x: F.interpolate(x, size=(4, 4), mode="bilinear", antialias=True),
}


class Resized(nn.Module):
    def __init__(self, resize: Any) -> None:
        super().__init__()
        self.resize = resize

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(x)


SHOWN: dict[str, tuple[Any, dict[str, object]]] = {
    "function": (lambda x: F.interpolate(x, (7, 7), None, "bicubic"), {"size": (7, 7), "mode": "bicubic"}),
    "aten bilinear": (
        lambda x: aten.upsample_bilinear2d.default(x, [12, 12], False, None, None),
        {"size": (12, 12), "align_corners": False, "mode": "bilinear"},
    ),
    "aten by factors": (
        lambda x: aten.upsample_bilinear2d.vec(x, None, True, [2.0, 2.0]),
        {"align_corners": True, "scale_factor": (2.0, 2.0), "mode": "bilinear"},
    ),
    "aten nearest": (lambda x: aten.upsample_nearest2d.default(x, [12, 12], None, None), {"size": (12, 12), "mode": "nearest"}),
    "aten nearest by factors": (
        lambda x: aten.upsample_nearest2d.vec(x, None, [2.0, 2.0]),
        {"scale_factor": (2.0, 2.0), "mode": "nearest"},
    ),
    "anti-aliased": (
        lambda x: aten._upsample_bilinear2d_aa.default(x, [4, 4], False),
        {"size": (4, 4), "align_corners": False, "mode": "bilinear"},
    ),
}


@pytest.mark.parametrize("spelling", SHOWN)
def test_each_spelling_shows_its_own_arguments(spelling: str) -> None:
    resize, expected = SHOWN[spelling]
    (layer,) = (layer for layer in cc.capture_graph(Resized(resize), torch.randn(1, 3, 6, 6)) if layer.kind == "interpolate")
    assert layer.attributes == expected


class Upsampled(nn.Module):
    def __init__(self, resize: Any) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)
        self.resize = resize

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.resize(self.first(x).relu())).relu())


def compressed(resize: Any) -> tuple[cc.QuantizedModel, Tensor]:
    x = torch.randn(2, 3, 8, 8)
    quantized = cc.quantize(Upsampled(resize).eval(), None, (x,))
    quantized.calibrate([(x,), (torch.randn(2, 3, 8, 8),)])
    return quantized, x


@pytest.mark.parametrize("resize", NEAREST.values(), ids=NEAREST)
def test_to_the_nearest_nothing_is_rounded_again(resize: Any) -> None:
    quantized, x = compressed(resize)
    assert "interpolate" in quantized.plan.quantized
    assert "interpolate" not in quantized.plan.tensors
    seen: list[Tensor] = []
    quantized.model.second.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    quantized.model(x)
    scale = quantized.activations["relu"].scale
    assert torch.equal((seen[0] / scale).round() * scale, seen[0])


@pytest.mark.parametrize("name", ["interpolate", "exact"])
def test_to_the_nearest_is_on_integers_after_training_too(name: str, tmp_path: Path) -> None:
    """Ranges of their own would drift apart in training, and the engine could then not resize integers."""
    quantized, x = compressed(NEAREST[name])
    quantized.model.train()
    optimizer = torch.optim.SGD(quantized.model.parameters(), 0.1)
    for _ in range(5):
        quantized.model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        quantized.update_ranges()
    quantized.model.eval()
    report = quantized.export(tmp_path / "model.onnx", (x,))
    assert "Resize" not in report.float_nodes
    assert report.integer_nodes == {"QLinearConv": 2}
    assert report.conversions == 2
    assert report.sqnr_db > 40


@pytest.mark.parametrize("resize", OTHERS.values(), ids=OTHERS)
def test_others_compute_in_float_and_are_said_to(resize: Any, tmp_path: Path) -> None:
    quantized, _ = compressed(resize)
    assert "interpolate with these arguments is computed in float by ort" in quantized.plan.skipped["interpolate"]
