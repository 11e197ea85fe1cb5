"""Layers that are called as operators (`torch.ops.aten`) are the same layers where a compiler or an export traces the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cco import quantize

ALL = {"global_quantization_settings": {"skip_tail_quantization": False}}
A = torch.ops.aten


class Called(nn.Module):
    """Three convolutions; a function calls the second one."""

    def __init__(self, call: Callable[[nn.Conv2d, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self.second, torch.relu(self.first(x))))


def norm(x: Tensor) -> Tensor:
    weight, bias, mean, variance = torch.full((8,), 0.7), torch.full((8,), 0.1), torch.full((8,), 0.1), torch.full((8,), 2.0)
    return A.batch_norm.default(x, weight, bias, mean, variance, False, 0.1, 1e-3, False)


def convolved(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return torch.relu(torch.convolution(x, layer.weight, layer.bias, [1], [1], [1], False, [0], 1))


def transposed(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return torch.relu(A.convolution.default(x, layer.weight, layer.bias, [2, 2], [1, 1], [1, 1], True, [1, 1], 1))


CALLS = {
    "conv": lambda layer, x: torch.relu(A.conv2d.default(x, layer.weight, layer.bias, [1, 1], [1, 1])),
    "convolution": lambda layer, x: torch.relu(
        A.convolution.default(x, layer.weight, layer.bias, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    ),
    "torch.convolution": convolved,
    "transposed": transposed,
    "relu": lambda layer, x: A.relu.default(layer(x)),
    "avg_pool": lambda layer, x: layer(A.avg_pool2d.default(x, [2, 2], [2, 2])),
    "batch_norm": lambda layer, x: torch.relu(norm(layer(x))),
}


@pytest.mark.parametrize("call", CALLS)
def test_compiled_it_computes_the_same(call: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10, 10)
    quantized = quantize(Called(CALLS[call]).eval(), ALL, (x,))
    quantized.calibrate([x])
    torch.compiler.reset()
    compiled = torch.compile(quantized.model, backend="eager", fullgraph=True)
    with torch.no_grad(), quantized.disabled():
        float_result = quantized.model(x)
    with torch.no_grad():
        eager = quantized.model(x)
        torch.testing.assert_close(compiled(x), eager, rtol=0, atol=1e-6)
    assert not torch.allclose(eager, float_result, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("call", ["conv", "torch.convolution", "batch_norm"])
def test_exported_it_runs_in_int8(call: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10, 10)
    quantized = quantize(Called(CALLS[call]).eval(), ALL, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "a.onnx", dynamic_batch=False)
    assert report.integer_nodes["QLinearConv"] == 3
    assert report.sqnr_db > 45


@pytest.mark.parametrize("call", ["convolution", "torch.convolution", "transposed"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_any_convolution_computes_as_the_function_of_its_dimensions(call: str, dimensions: int) -> None:
    torch.manual_seed(0)
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    functions = ((F.conv1d, F.conv_transpose1d), (F.conv2d, F.conv_transpose2d), (F.conv3d, F.conv_transpose3d))[dimensions - 1]
    layer, x, ones = make(8, 8, 3, groups=2), torch.randn(2, 8, *[6] * dimensions), [1] * dimensions
    of_all: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "convolution": (
            lambda x: A.convolution.default(x, layer.weight, layer.bias, ones, ones, ones, False, ones, groups=2),
            lambda x: functions[0](x, layer.weight, layer.bias, padding=1, groups=2),
        ),
        "torch.convolution": (
            lambda x: torch.convolution(x, layer.weight, None, [2], [0], [1], False, [0], 2),
            lambda x: functions[0](x, layer.weight, stride=2, groups=2),
        ),
        "transposed": (
            lambda x: A.convolution(x, layer.weight, None, [2], [1], [1], output_padding=[1], transposed=True, groups=2),
            lambda x: functions[1](x, layer.weight, stride=2, padding=1, output_padding=1, groups=2),
        ),
    }
    results = []
    for function in of_all[call]:
        model = OfFunction(function, layer)
        quantized = quantize(model, ALL, (x,))
        quantized.calibrate([x])
        with torch.no_grad():
            results.append(quantized.model(x))
        kinds = [one.kind for one in quantized.graph if one.weighted]
        assert kinds == ["conv_transpose" if call == "transposed" else "conv"]
        quantized.remove()
    assert torch.equal(*results)


class OfFunction(nn.Module):
    """A function of a layer's weight."""

    def __init__(self, function: Callable[[Tensor], Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
