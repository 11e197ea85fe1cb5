"""What only moves values keeps them on their grid: in a program, each product after it reads a dequantize operator, or engines compute it in float."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own

MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda h: h.flip(3),
    "roll": lambda h: h.roll(1, 2),
    "gather": lambda h: h.gather(3, torch.zeros_like(h, dtype=torch.long)),
    "index_select": lambda h: h.index_select(1, torch.arange(7, -1, -1)),
    "indices": lambda h: h[:, [1, 0, 3, 2, 5, 4, 7, 6]],
    "repeat": lambda h: h.repeat(1, 1, 2, 1),
    "repeat_interleave": lambda h: h.repeat_interleave(2, 3),
    "unbind": lambda h: h.unsqueeze(1).unbind(1)[0],
    "channel_shuffle": lambda h: F.channel_shuffle(h, 2),
    "pixel_shuffle": lambda h: F.pixel_shuffle(h.repeat(1, 4, 1, 1), 2),
    "nearest": lambda h: F.interpolate(h, scale_factor=2.0),
    "nearest-exact": lambda h: F.interpolate(h, size=(5, 7), mode="nearest-exact"),
    "adaptive_max_pool2d": lambda h: F.adaptive_max_pool2d(h, 4),
    "unfold": lambda h: F.unfold(h, 2, stride=2).view(-1, 8, 4, 16),
    "reflected": lambda h: F.pad(h, (1, 1, 1, 1), mode="reflect"),
    "two after each other": lambda h: h.flip(3).mT.roll(1, 3),
}


class Branches(nn.Module):
    """A convolution whose result each branch moves, and another one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 1, 1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 2, 1) for _ in MOVES)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.first(x))
        return [F.relu(conv(move(x))) for conv, move in zip(self.convs, MOVES.values(), strict=True)]


def test_each_product_of_a_program_reads_a_dequantize_operator(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    settings = {
        "global_quantization_settings": {"skip_tail_quantization": False},
        "deployment_settings": {"target_framework": "executorch"},
    }
    quantized = quantize(Branches().eval(), settings, (x,))
    quantized.calibrate([x])
    assert sum(layer.kind == "conv" and layer.name in quantized.plan.quantized for layer in quantized.graph) == len(MOVES) + 1
    program = quantized.export(tmp_path / "a.pt2")
    read = [str(node.args[0].target) for node in program.graph.nodes if "conv2d" in str(node.target)]
    assert len(read) == len(MOVES) + 1
    moved = dict(zip(MOVES, read[1:], strict=True))
    assert not [move for move, target in moved.items() if "dequantize" not in target]
    with torch.no_grad():
        for found, expected in zip(program.module()(x), quantized.model(x), strict=True):
            torch.testing.assert_close(found, expected)
