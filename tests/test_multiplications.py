"""The multiplications of each layer; the reference is PyTorch's own counter of floating-point operations, two of which are one multiplication."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_cco import capture_graph

A, B = torch.randn(2, 5, 6), torch.randn(2, 6, 7)


class Call(nn.Module):
    """One function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("weight", torch.randn(6, 7))

    def forward(self, *x: Tensor) -> Any:
        return self.function(self.weight, *x)


CASES = {
    "conv1d": (nn.Conv1d(6, 4, 3, stride=2, padding=1), (torch.randn(2, 6, 9),)),
    "conv2d": (nn.Conv2d(6, 4, 3, padding=1), (torch.randn(2, 6, 8, 9),)),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6), (torch.randn(2, 6, 8, 9),)),
    "dilated conv3d": (nn.Conv3d(2, 4, 2, dilation=2), (torch.randn(2, 2, 5, 6, 7),)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2), (torch.randn(2, 6, 8, 9),)),
    "linear": (nn.Linear(6, 7), (A,)),
    "matmul of a parameter": (Call(lambda w, a: a @ w), (A,)),
    "matmul of activations": (Call(lambda w, a, b: a @ b), (A, B)),
    "vector": (Call(lambda w, a: a[0, 0] @ w), (A,)),
    "bmm": (Call(lambda w, a, b: torch.bmm(a, b)), (A, B)),
    "addmm": (Call(lambda w, a: torch.addmm(a[:, 0].sum() * torch.ones(7), a[0], w)), (A,)),
    "baddbmm": (Call(lambda w, a, b: torch.baddbmm(torch.zeros(1), a, b)), (A, B)),
    "einsum": (Call(lambda w, a: torch.einsum("bij,jk->bik", a, w)), (A,)),
    "einsum with a batch": (Call(lambda w, a, b: torch.einsum("b i j, b j k -> b i k", a, b)), (A, B)),
    "einsum with dots": (Call(lambda w, a: torch.einsum("...j,jk->...k", a, w)), (A,)),
    "attention": (Call(lambda w, a: F.scaled_dot_product_attention(a[:, None], a[:, None, :4], a[:, None, :4, :3])), (A,)),
}


@pytest.mark.parametrize("case", CASES)
def test_as_pytorch_counts(case: str) -> None:
    model, example = CASES[case]
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*example)
    assert sum(layer.multiplications for layer in capture_graph(model, *example)) == counter.get_total_flops() // 2 > 0


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers(kind: type[nn.RNNBase], gates: int, bidirectional: bool) -> None:
    layer = kind(6, 5, num_layers=2, bidirectional=bidirectional, batch_first=True)
    ways = 2 if bidirectional else 1
    expected = A.shape[0] * A.shape[1] * gates * 5 * ways * ((6 + 5) + (5 * ways + 5))
    assert sum(each.multiplications for each in capture_graph(layer, A)) == expected


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3)])
def test_cells(kind: type[nn.RNNCellBase], gates: int) -> None:
    assert sum(each.multiplications for each in capture_graph(kind(6, 5), A[0])) == 5 * gates * 5 * (6 + 5)


def test_what_multiplies_nothing() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.ReLU())
    assert sum(layer.multiplications for layer in capture_graph(model, torch.zeros(2, 3, dtype=torch.long))) == 0


def test_bilinear_is_a_linear_layer_of_all_pairs() -> None:
    layer, x, y = nn.Bilinear(3, 4, 5), torch.randn(2, 3), torch.randn(2, 4)
    with FlopCounterMode(display=False) as counter:
        pairs = F.linear((x[:, :, None] * y[:, None]).flatten(1), layer.weight.flatten(1), layer.bias)
    torch.testing.assert_close(pairs, layer(x, y))
    (found,) = [each for each in capture_graph(layer, x, y) if each.kind == "bilinear"]
    assert found.weighted
    assert found.multiplications == counter.get_total_flops() // 2
