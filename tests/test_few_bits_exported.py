"""Files of weights and activations of few bits: biases must not be lost on the grid of the accumulator."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from models import ResidualCNN
from onnx import numpy_helper

import lightning_cco as cc

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


def trained(bits: int, seed: int, vnni: bool | None = None) -> tuple[cc.QuantizedModel, torch.Tensor]:
    torch.manual_seed(seed)
    model, x, labels = ResidualCNN(), torch.randn(16, 1, 16, 16), torch.randint(0, 10, (16,))
    general = {"weights_num_bits": bits, "activations_num_bits": bits, "residual_stream": "quantized"}
    rules = [{"match": "conv", "weights_num_bits": bits}]  # else it keeps 8
    recipe = {"global_quantization_settings": general, "deployment_settings": {"vnni": vnni}, "layer_settings": rules}
    quantized = cc.quantize(model, recipe, (x,))
    quantized.calibrate([x])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(10):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    model.eval()
    return quantized, x


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_layer_is_right(bits: int, tmp_path: Path) -> None:
    quantized, x = trained(bits, seed=2)
    report = quantized.export(tmp_path / "model.onnx", (x,))
    assert report.mean_steps < 0.002  # 0.004 to 0.016 with biases on the coarse grid
    assert report.integer_nodes["QLinearConv"] == 5


@pytest.mark.parametrize("vnni", [False, True])
def test_the_stored_weights_are_the_rounded_ones(vnni: bool, tmp_path: Path) -> None:
    quantized, x = trained(2, seed=0, vnni=vnni)
    quantized.export(tmp_path / "model.onnx", (x,))
    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored and stored[node.input[0]].ndim == 4:
            values = torch.from_numpy(stored[node.input[0]].astype("int16")) - int(stored[node.input[2]].flat[0])
            for channel in values:
                assert len(channel.unique()) <= 3
                assert int(channel.abs().max()) in (0, 64)


class Tails(torch.nn.Module):
    """Results in float of a linear layer and of a product with a matrix and an addend, one of them through a ReLU before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)
        self.matrix, self.addend = torch.nn.Parameter(torch.randn(8, 4)), torch.nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.first(x).relu()
        return self.second(x), torch.addmm(self.addend, x, self.matrix)


@pytest.mark.parametrize(("weights", "activations", "vnni"), [(6, 2, True), (2, 2, False), (4, 4, True), (8, 8, True)])
def test_a_float_result_has_its_whole_bias(weights: int, activations: int, vnni: bool, tmp_path: Path) -> None:
    """Against PyTorch's own fake quantization. By the grid of the accumulator alone 0.3 to 2 of a thousand of the largest output are lost at 2 bits."""
    torch.manual_seed(1)
    model, x = Tails().eval(), torch.randn(64, 6)
    general = {"weights_num_bits": weights, "activations_num_bits": activations, "skip_tail_quantization": False}
    rules = [{"match": "*", "activations_num_bits": activations}]
    recipe = {"global_quantization_settings": general, "layer_settings": rules, "deployment_settings": {"vnni": vnni}}
    quantized = cc.quantize(model, recipe, (x,))
    quantized.calibrate([x])
    report = quantized.export(tmp_path / "model.onnx", (x,))
    assert report.integer_nodes == {"QGemm": 3}
    assert report.float_nodes == ({"Add": 2} if activations < 8 else {})

    def rounded(value: torch.Tensor, name: str) -> torch.Tensor:
        quantizer = quantized.activations[name]  # type: ignore[index]
        return torch.fake_quantize_per_tensor_affine(value, float(quantizer.scale), int(quantizer.zero_point), 0, 2**activations - 1)

    def weight(value: torch.Tensor, layer: str, axis: int) -> torch.Tensor:
        scale, last = quantized.weights[layer][0].scale(value).flatten(), 2 ** (weights - 1) - 1
        return torch.fake_quantize_per_channel_affine(value, scale, torch.zeros(len(scale), dtype=torch.int32), axis, -last, last)

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        read = rounded(x, "input_0")
        hidden = rounded(torch.relu(torch.nn.functional.linear(read, weight(model.first.weight, "linear", 0), model.first.bias)), "relu")
        expected = (
            torch.nn.functional.linear(hidden, weight(model.second.weight, "linear_1", 0), model.second.bias),
            torch.addmm(model.addend, hidden, weight(model.matrix, "addmm", 1)),
        )
    for ours, theirs in zip(found, expected, strict=True):
        right = (torch.from_numpy(ours) - theirs).abs().amax(1) < (1e-5 if activations < 8 else 2e-4) * float(theirs.abs().max())
        assert float(right.float().mean()) > 0.9  # where nothing in the middle between two levels went the other way
