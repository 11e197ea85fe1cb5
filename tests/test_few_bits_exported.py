"""Files of weights and activations of few bits: biases must not be lost on the grid of the accumulator."""

from __future__ import annotations

from pathlib import Path

import onnx
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
