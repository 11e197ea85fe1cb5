"""Clamps in programs: what an engine takes into no operator before it would run by itself, on floats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.export.pt2e_passes import operator_of

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own

AT_THE_ENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "concat, relu": lambda a, b: F.relu(torch.cat([a, b], 1)),
    "concat, both ends": lambda a, b: torch.clamp(torch.cat([b, a], 1), -0.3, 0.4),
    "pooling, relu": lambda a, b: F.relu(F.adaptive_avg_pool2d(b, 1)).expand(-1, -1, 4, 4),
    "maximum, relu": lambda a, b: F.relu(F.max_pool2d(a, 3, 1, 1)),
}
"""Their levels end where the clamp does, or before."""
INSIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "concat, away from 0": lambda a, b: torch.clamp(torch.cat([a, b], 1), 0.1, 0.4),  # levels begin at 0
    "difference, relu": lambda a, b: F.relu(a - b),  # one operator
}


class Branches(nn.Module):
    """Two convolutions, and one behind each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        for conv in (self.first, self.second):
            nn.init.constant_(conv.bias, 0.5)  # some means are above 0
        self.branches = [*AT_THE_ENDS.values(), *INSIDE.values()]
        self.convs = nn.ModuleList(nn.LazyConv2d(2, 1) for _ in self.branches)

    def forward(self, x: Tensor) -> list[Tensor]:
        a, b = self.first(x), self.second(x)
        return [conv(branch(a, b)) for conv, branch in zip(self.convs, self.branches, strict=True)]


def test_a_clamp_that_rounding_does_is_no_operator(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    model = Branches().eval()
    model(x)
    settings = {
        "global_quantization_settings": {"skip_tail_quantization": False},
        "deployment_settings": {"target_framework": "executorch"},
    }
    quantized = quantize(model, settings, (x,))
    quantized.calibrate([x])
    program = quantized.export(tmp_path / "a.pt2")
    clamps = [node for node in program.graph.nodes if operator_of(node) in ("aten::relu", "aten::hardtanh", "aten::clamp")]
    read = sorted(operator_of(node.args[0]) for node in clamps)
    assert read == ["aten::sub", *["quantized_decomposed::dequantize_per_tensor"] * 2], "of two that are concatenated, each is clamped"
    with torch.no_grad():
        for found, expected in zip(program.module()(3 * x), quantized.model(3 * x), strict=True):
            torch.testing.assert_close(found, expected)
