"""What is written otherwise for ONNX Runtime is the same computation, and the engine runs it as intended."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from export_case import calibrated, run
from torch import Tensor, nn

from lightning_cco import quantize
from lightning_cco.export.engine_patterns import adds_products_exactly, has_matrix_units

WHOLE = {"global_quantization_settings": {"skip_tail_quantization": False}}


class Attention(nn.Module):
    """Self-attention whose query, key and value come from one linear layer."""

    def __init__(self, split: str, bias: bool = True, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.split, self.heads = split, heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x))
        heads = (*x.shape[:2], self.heads, -1)
        if self.split in ("unbind", "index"):
            parts = qkv.reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = parts.unbind(0) if self.split == "unbind" else (parts[0], parts[1], parts[2])
        else:
            parts = qkv.split([24, 24, 24], -1) if self.split == "split" else qkv.chunk(3, dim=-1)
            q, k, v = (part.reshape(heads).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.out(mixed)


class Uneven(nn.Module):
    """A gated unit with parts of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.out = nn.LayerNorm(8), nn.Linear(8, 20), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.wide(self.norm(x)).split([16, 4], -1)
        return self.out(F.gelu(value)) + torch.softmax(gate, -1).amax(-1, keepdim=True)


class ReadWhole(nn.Module):
    """Something else reads the result whole, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.out = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.wide(self.norm(x))
        a, b = wide.chunk(2, -1)
        return self.out(F.gelu(a)) + torch.softmax(b, -1) + torch.softmax(wide, -1).amax(-1, keepdim=True)


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        *(pytest.param(lambda s=split: Attention(s), 3, id=split) for split in ("chunk", "split", "unbind", "index")),
        pytest.param(lambda: Attention("unbind", bias=False), 3, id="no bias"),
        pytest.param(Uneven, 2, id="uneven"),
        pytest.param(ReadWhole, 0, id="read whole"),
    ],
)
def test_a_split_linear_layer_is_a_product_for_each_part(model: Any, parts: int, tmp_path: Path) -> None:
    quantized, x = calibrated(model(), lambda: torch.randn(4, 6, 24 if parts == 3 else 8), WHOLE)
    report = quantized.export(tmp_path / "model.onnx")
    names = [node.name for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "MatMul"]
    assert sum(".part_" in name for name in names) == parts
    with torch.no_grad():
        expected = quantized.model(x).numpy()
    # A value on the edge between two levels may fall either way; the others agree to float rounding.
    assert np.median(np.abs(run(tmp_path / "model.onnx", x, optimize=False) - expected)) < 1e-6
    assert report.sqnr_db > 40
    assert report.integer_nodes["MatMulIntegerToFloat"] >= max(1, parts)
    # The same weights in another order of tensors.
    stored = {entry.name: onnx.numpy_helper.to_array(entry) for entry in onnx.load(tmp_path / "model.onnx").graph.initializer}
    integers = sum(array.size for array in stored.values() if array.dtype in (np.int8, np.uint8) and array.ndim == 2)
    assert integers == sum(p.numel() for p in quantized.model.parameters() if p.dim() == 2)


class Picks(nn.Module):
    """Reads one token of a rounded tensor, as classifiers on a class token do."""

    def __init__(self, pick: str) -> None:
        super().__init__()
        self.pick, self.norm, self.head = pick, nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        token = {"index": lambda: x[:, 0], "slice": lambda: x[:, 1:3], "chunk": lambda: x.chunk(2, 1)[1]}[self.pick]()
        return self.head(token)


@pytest.mark.parametrize("pick", ["index", "slice", "chunk"])
def test_a_layer_that_reads_a_part_of_a_rounded_tensor_runs_in_int8(pick: str, tmp_path: Path) -> None:
    quantized, x = calibrated(Picks(pick), lambda: torch.randn(4, 6, 8), WHOLE)
    report = quantized.export(tmp_path / "model.onnx")
    assert sum(report.integer_nodes.values()) == 1
    assert not report.float_nodes.keys() & {"Gemm", "MatMul"}
    with torch.no_grad():
        np.testing.assert_allclose(run(tmp_path / "model.onnx", x), quantized.model(x).numpy(), atol=1e-4)


class Reread(nn.Module):
    """A residual around the input, which two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


def test_an_input_that_two_layers_read(tmp_path: Path) -> None:
    quantized, _ = calibrated(Reread(), lambda: torch.randn(4, 8))
    report = quantized.export(tmp_path / "model.onnx")
    assert report.sqnr_db > 40
    assert {entry.layer for entry in report.layers} == set(quantized.plan.tensors)
    names = [node.name for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "QuantizeLinear"]
    assert sorted(name.removesuffix("_quantize").partition(".")[0] for name in names if "input_0" in name)[0] == "input_0"
    assert {name.removesuffix("_quantize") for name in names} >= set(quantized.plan.tensors)


class AddsParameter(nn.Module):
    """Positions that are added to what a convolution made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
        self.positions = nn.Parameter(torch.randn(1, 8, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + self.positions)


@pytest.mark.parametrize(("target", "kind"), [("ort", np.uint8), ("tensorrt", np.int8)])
def test_a_parameter_is_added_in_int8(target: str, kind: Any, tmp_path: Path) -> None:
    settings = WHOLE | {"deployment_settings": {"target_framework": target}}
    quantized, _ = calibrated(AddsParameter(), lambda: torch.randn(2, 4, 6, 6), settings)
    report = quantized.export(tmp_path / "model.onnx")
    # ONNX Runtime computes a convolution with TensorRT's float bias in float, and so what is added to it.
    assert report.integer_nodes.get("QLinearAdd", 0) == (target == "ort")
    stored = [onnx.numpy_helper.to_array(entry) for entry in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert [array.dtype.type for array in stored if array.shape == (1, 8, 6, 6)] == [kind]


class Kept(nn.Module):
    """A result that is an output and is split, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide = nn.LayerNorm(8), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        wide = self.wide(self.norm(x))
        return wide, *(F.gelu(part) for part in wide.chunk(3, -1))


def test_a_result_that_is_an_output_stays_whole(tmp_path: Path) -> None:
    quantized, _ = calibrated(Kept(), lambda: torch.randn(4, 6, 8), WHOLE)
    quantized.export(tmp_path / "model.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node].count("MatMul") == 1


class Pruned(nn.Module):
    """Channels that are 0 or nearly so, whose bias is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            self.second.weight[3:5] *= torch.tensor([0.0, 1e-7]).reshape(2, 1, 1, 1)
            self.third.weight[2] = 0
            self.second.bias[3:5], self.third.bias[2] = 0.7, -1.0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3))
        return self.head(torch.relu(self.third(x) + 1.5))


@pytest.mark.parametrize("target", ["ort", "openvino", "tensorrt"])
def test_channels_without_weights_keep_their_bias(target: str, tmp_path: Path) -> None:
    quantized, x = calibrated(Pruned(), lambda: torch.randn(4, 3, 8, 8), {"deployment_settings": {"target_framework": target}})
    report = quantized.export(tmp_path / "model.onnx")
    assert report.sqnr_db > 35
    with torch.no_grad():
        expected = quantized.model(x).numpy()
    for optimize in (
        target == "ort" or adds_products_exactly(),
        False,
    ):  # without VNNI ONNX Runtime can't run another engine's int8 weights
        got = run(tmp_path / "model.onnx", x, optimize=optimize)
        assert np.square(got - expected).sum() < 1e-3 * np.square(expected).sum()


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens)))


def test_a_tied_embedding_in_four_bits(tmp_path: Path) -> None:
    settings = {"global_quantization_settings": {"weights_num_bits": 4, "skip_tail_quantization": False}}
    quantized, tokens = calibrated(Tied(), lambda: torch.randint(0, 20, (4, 6)), settings)
    quantized.export(tmp_path / "model.onnx", int4=True)
    types = {entry.data_type for entry in onnx.load(tmp_path / "model.onnx").graph.initializer if tuple(entry.dims) == (20, 8)}
    assert types - {onnx.TensorProto.UINT8} == {onnx.TensorProto.INT8, onnx.TensorProto.INT4}
    with torch.no_grad():
        np.testing.assert_allclose(run(tmp_path / "model.onnx", tokens), quantized.model(tokens).numpy(), atol=1e-5)


class Several(nn.Module):
    """Takes any number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, scale: Tensor, *inputs: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(torch.stack(inputs).sum(0))) * scale)


def test_any_number_of_inputs(tmp_path: Path) -> None:
    inputs = [torch.rand(4, 1), torch.randn(4, 8), torch.randn(4, 8)]
    quantized = quantize(Several().eval(), None, tuple(inputs))
    quantized.calibrate([tuple(inputs)])
    assert quantized.export(tmp_path / "model.onnx").sqnr_db > 40
    fewer = [tensor[:3] for tensor in inputs]
    with torch.no_grad():
        np.testing.assert_allclose(run(tmp_path / "model.onnx", *fewer), quantized.model(*fewer).numpy(), atol=1e-2)
    quantized.export(tmp_path / "model.pt2")


class Deep(nn.Module):
    """Convolutions deep enough for matrix units, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.shallow, self.deep = nn.Conv2d(8, 128, 1), nn.Conv2d(128, 16, 3, padding=1)
        self.grouped, self.head = nn.Conv2d(16, 16, 3, groups=16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.grouped(torch.relu(self.deep(torch.relu(self.shallow(x)))))).mean((2, 3)))


def test_deep_convolutions_for_matrix_units_give_the_same_values(tmp_path: Path) -> None:
    quantized, x = calibrated(Deep(), lambda: torch.randn(2, 8, 6, 6), {"deployment_settings": {"vnni": True}})
    results, zero_points, notes = {}, {}, {}
    for amx in (True, False, None):
        quantized.settings.deployment_settings.amx = amx
        path = tmp_path / f"{amx}.onnx"
        report = quantized.export(path)
        assert report.integer_nodes["QLinearConv"] == 3
        graph = onnx.load(path).graph
        stored = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
        weights = [node for node in graph.node if node.op_type == "DequantizeLinear" and stored.get(node.input[0], np.array(0)).ndim == 4]
        zero_points[amx] = Counter(int(stored[node.input[2]].min()) for node in weights)
        results[amx], notes[amx] = run(path, x, optimize=adds_products_exactly()), any("AMX" in note for note in report.notes)
    assert zero_points[True] == {0: 2, -1: 1}
    assert zero_points[False] == {0: 3}
    assert np.array_equal(results[True], results[False])
    assert notes == {True: True, False: False, None: has_matrix_units()}
    assert zero_points[None] == zero_points[has_matrix_units()]


def test_matrix_units_are_no_matter_for_other_engines(tmp_path: Path) -> None:
    quantized, _ = calibrated(
        Deep(), lambda: torch.randn(2, 8, 6, 6), {"deployment_settings": {"target_framework": "openvino", "amx": True}}
    )
    assert not any("AMX" in note for note in quantized.export(tmp_path / "model.onnx").notes)


def test_matrix_units_and_four_bits(tmp_path: Path) -> None:
    settings = {"global_quantization_settings": {"weights_num_bits": 4}, "deployment_settings": {"amx": True}}
    quantized, x = calibrated(Deep(), lambda: torch.randn(2, 8, 6, 6), settings)
    report = quantized.export(tmp_path / "packed.onnx", int4=True)
    assert {island.reason for island in report.float_islands if island.operator == "Conv"} == {
        "its weights are stored in 4 bits, for which the engine has no INT8 product"
    }
    quantized.export(tmp_path / "wide.onnx")
    # Weights of 4 bits in 8 have a finer scale, so that their biases are rounded less.
    np.testing.assert_allclose(run(tmp_path / "packed.onnx", x, optimize=False), run(tmp_path / "wide.onnx", x, optimize=False), atol=1e-3)
