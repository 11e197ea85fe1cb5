"""No tensor is rounded for nothing: in the graph that ONNX Runtime makes of the file, an integer operator makes or reads each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from export_case import MODELS, calibrated
from torch import Tensor, nn

from lightning_cco.export.check import engine_session

MOVING = {"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "Split", "MaxPool", "NhwcMaxPool", "Pad", "Expand"}
MOVING |= {"SpaceToDepth", "DepthToSpace", "Tile", "ReorderInput", "ReorderOutput", "Resize", "Identity", "Clip"}
INTEGER = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul")


class Excited(nn.Module):
    """Squeeze and excitation between convolutions, upsampled by a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4), nn.Linear(4, 8)
        self.grow, self.out, self.act = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1), nn.PReLU(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
        x = self.grow(x * gate[:, :, None, None])
        return self.head(self.act(self.out(x)).mean((2, 3)))


class Dense(nn.Module):
    """Norm, clamp and convolution of everything before: pre-activation over concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(24, 3)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 * n), nn.ReLU(), nn.Conv2d(8 * n, 8, 3, padding=1, bias=False)) for n in (1, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(torch.relu(x).mean((2, 3)))


class Heard(nn.Module):
    """A convolution over time, a recurrent layer, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.rnn = (
            nn.Conv1d(5, 8, 3, padding=1),
            nn.BatchNorm1d(8),
            nn.GRU(8, 12, batch_first=True, bidirectional=True),
        )
        self.fc, self.head = nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(torch.relu(self.norm(self.conv(x))).transpose(1, 2))
        return self.head(torch.relu(self.fc(states[:, -1])))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "excited": (Excited, lambda: torch.randn(4, 3, 8, 8)),
    "dense": (Dense, lambda: torch.randn(4, 3, 8, 8)),
    "heard": (Heard, lambda: torch.randn(4, 5, 9)),
    **{name: MODELS[name][:2] for name in ("cnn", "residual", "unet", "lstm", "tokens")},
}


def idle_quantizers(graph: Any) -> list[str]:
    """QuantizeLinear nodes that are left and that no integer operator reads, also past operators that only move values.

    The others went into the integer operator that makes what they round; ONNX Runtime then names the result after any of the fused nodes.
    """
    read: dict[str, list[Any]] = {}
    for node in graph.node:
        for value in node.input:
            read.setdefault(value, []).append(node)

    def serves(value: str) -> bool:
        return any(
            node.op_type.startswith(INTEGER) or (node.op_type in MOVING and any(map(serves, node.output))) for node in read.get(value, [])
        )

    return [node.output[0] for node in graph.node if node.op_type == "QuantizeLinear" and not serves(node.output[0])]


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("name", NETS)
def test_each_rounded_tensor_has_an_integer_operator(name: str, tmp_path: Path) -> None:
    make, example = NETS[name]
    quantized, _ = calibrated(make(), example)
    quantized.export(tmp_path / "model.onnx")
    engine_session(str(tmp_path / "model.onnx"), optimized_model_filepath=str(tmp_path / "optimized.onnx"))
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    assert any(node.op_type.startswith(INTEGER) for node in graph.node)
    assert idle_quantizers(graph) == []
