"""Additions and products between floats: none of them is in INT8 only since the one beside it is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize


class Rotary(nn.Module):
    """Attention with rotated queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        angles = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotate(self, x: Tensor) -> Tensor:
        left, right = x[..., :2], x[..., 2:]
        return x * self.cos + torch.cat([-right, left], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Embedded(nn.Module):
    """Sums of embeddings before a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds, self.positions = nn.Embedding(9, 8), nn.Embedding(9, 8), nn.Parameter(torch.randn(1, 6, 8))
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        ids = x[..., 0].abs().long()
        return self.out(self.norm(self.words(ids) + self.positions + self.kinds(ids)))


class Gated(nn.Module):
    """A sum of two products, of which the softmax is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.out = nn.Linear(8, 32), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.parts(x).chunk(4, -1)
        return self.out((a.tanh() * b + c.tanh() * d).softmax(-1))


class Summed(Gated):
    """The same sum, read by a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.parts(x).chunk(4, -1)
        return self.out(a.tanh() * b + c.tanh() * d)


class Normed(nn.Module):
    """An RMSNorm written out and a gated MLP, between residual additions."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.weight = nn.Linear(8, 8), nn.Parameter(torch.rand(8) + 0.5)
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.start(x)
        normed = self.weight * (stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + 1e-6))
        return stream + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Images(nn.Module):
    """The product and the sum of what convolutions give, read by one."""

    def __init__(self) -> None:
        super().__init__()
        self.convs, self.out = nn.ModuleList(nn.Conv1d(6, 6, 1) for _ in range(3)), nn.Conv1d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (conv(x).relu() for conv in self.convs)
        return self.out(a * b + c)


def operators(model: nn.Module, folder: Path) -> Counter[str]:
    """Operators of the file as the engine optimizes it."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8)
    network = nn.Sequential(model, nn.Linear(8, 3)).eval()
    quantized = quantize(network, None, (x,))
    quantized.calibrate([x])
    quantized.export(folder / "model.onnx", check=False)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(folder / "model.onnx", options)
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize(("make", "read"), [(Rotary, 2), (Embedded, 1), (Gated, 2), (Summed, 2), (Normed, 3)])
def test_nothing_is_rounded_between_floats_but_what_products_read(make: type[nn.Module], read: int, tmp_path: Path) -> None:
    found = operators(make(), tmp_path)
    assert not {kind for kind in found if kind.startswith("QLinear")}
    assert found["QuantizeLinear"] <= read


def test_what_is_made_of_int8_and_read_in_int8_is_in_int8(tmp_path: Path) -> None:
    found = operators(Images(), tmp_path)
    assert found["QLinearMul"] == 1
    assert found["QLinearAdd"] == 1
