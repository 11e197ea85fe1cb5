"""Graphs of `torch.fx` that are the user's own model, or a part of it: layers like all others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cco import quantize


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.conv(F.relu(self.norm(self.stem(x))))) * 2, 1).flatten(1))


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.inner(x)))


class Interpreted(nn.Module):
    def __init__(self, inner: torch.fx.GraphModule) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.fx.Interpreter(self.inner).run(x)


def exported(net: nn.Module) -> nn.Module:
    return torch.export.export(net, (torch.randn(2, 3, 8, 8),)).module()


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "traced": torch.fx.symbolic_trace,
    "traced, a part": lambda net: Around(torch.fx.symbolic_trace(net)),
    "interpreted": lambda net: Interpreted(torch.fx.symbolic_trace(net)),
    "exported": exported,
    "exported, a part": lambda net: Around(exported(net)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_of_the_users_own_are_quantized_as_the_plain_model_is(kind: str) -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 3, 8, 8)
    plain = quantize(net, None, (x,))
    plain.calibrate([x])
    expected, layers = net(x).detach(), [layer.kind for layer in plain.graph if layer.weighted]
    plain.remove()
    model = KINDS[kind](net)
    model.training = False
    quantized = quantize(model, None, (x,))
    quantized.calibrate([x])
    found = model(x).detach()
    assert [layer.kind for layer in quantized.graph if layer.weighted][: len(layers)] == layers
    assert quantized.drift == []
    if not isinstance(model, Around):
        assert set(plain.plan.quantized) - {"mul"} <= set(quantized.plan.quantized)
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)
    else:
        assert {"conv", "conv_1", "linear"} <= set(quantized.plan.quantized)


def test_operators_are_told_as_the_functions_they_are() -> None:
    class Operators(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc, self.norm = nn.Embedding(8, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, i: Tensor) -> Tensor:
            ops = torch.ops.aten
            x = ops.embedding.default(self.table.weight, i) + torch.embedding(self.table.weight, i)
            x = ops.linear(x, self.fc.weight, self.fc.bias)
            n = self.norm
            x = ops.batch_norm.default(x, n.weight, n.bias, n.running_mean, n.running_var, False, 0.1, 1e-5, False)
            return F.linear(ops.relu.default(x), self.fc.weight)

    i = torch.tensor([0, 3, 5])
    model = Operators().eval()
    with torch.no_grad():
        model.norm.running_mean.add_(0.5)
    expected = model(i).detach()
    quantized = quantize(model, None, (i,))
    quantized.calibrate([(i,)])
    assert [layer.kind for layer in quantized.graph][1:-1] == ["embedding", "embedding", "add", "linear", "batch_norm", "relu", "linear"]
    assert [quantized.capture.sites[name].weights[0].parameters for name in ("embedding", "embedding_1", "linear")] == [
        ("table.weight",),
        ("table.weight",),
        ("fc.weight",),
    ]
    torch.testing.assert_close(model(i).detach(), expected, atol=0.1, rtol=0)
