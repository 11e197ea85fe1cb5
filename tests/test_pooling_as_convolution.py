"""Average pooling of windows for LiteRT: as a convolution of each channel, in INT8 where windows are whole, in float else, against PyTorch's pooling."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from torch import nn

from lightning_cco import quantize
from lightning_cco.export.pooling_as_convolution import averaged_in_float

POOLS = {
    "whole": (nn.AvgPool2d(2), True),
    "overlapping": (nn.AvgPool2d((3, 2), (1, 2)), True),
    "adaptive": (nn.AdaptiveAvgPool2d((4, 2)), True),
    "border": (nn.AvgPool2d(3, 2, 1), False),
    "border that does not count": (nn.AvgPool2d(3, 1, 1, count_include_pad=False), False),
    "parts": (nn.AvgPool2d(3, ceil_mode=True), False),
    "divisor": (nn.AvgPool2d(2, divisor_override=3), False),
}


@pytest.mark.parametrize(("kernel", "stride", "padding"), list(itertools.product((2, 3, (3, 2)), (1, 2, None), (0, 1))))
@pytest.mark.parametrize("divisor", [None, 5])
def test_sums_of_windows_are_pytorchs_averages(kernel: Any, stride: Any, padding: int, divisor: int | None) -> None:
    x = torch.randn(2, 3, 11, 9)
    for ceil_mode, counted in itertools.product((False, True), (False, True)):
        call = {"padding": padding, "ceil_mode": ceil_mode, "count_include_pad": counted, "divisor_override": divisor}
        assert torch.allclose(averaged_in_float(x, kernel, stride, **call), F.avg_pool2d(x, kernel, stride, **call), atol=1e-5)


@pytest.mark.parametrize("name", POOLS)
def test_the_program_for_litert_convolves(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pool, in_int8 = POOLS[name]
    head = [nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), pool, *head).eval()
    x = torch.randn(1, 3, 16, 16)
    recipe = {"deployment_settings": {"target_framework": "litert"}, "global_quantization_settings": {"skip_tail_quantization": False}}
    quantized = quantize(model, recipe, (x,))
    quantized.calibrate([x])
    layer = "adaptive_avg_pool" if name == "adaptive" else "avg_pool"
    assert quantized.plan.decisions[layer].quantized is in_int8
    quantized.export(tmp_path / "a.pt2")
    program = torch.export.load(tmp_path / "a.pt2")
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("conv2d" in target for target in targets) == 3
    with torch.no_grad():
        step = float(quantized.activations["linear"].scale)
        assert (program.module()(x) - model(x)).abs().max() <= 1.01 * step
