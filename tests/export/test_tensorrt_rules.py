"""TensorRT's documented rules of explicit quantization, checked on the file: it could not be run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_case import MODELS, calibrated
from models import ResidualCNN
from onnx import numpy_helper
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
CHANNELS = {"Conv": 0, "ConvTranspose": 1}


def violations(model: Any) -> list[str]:
    """Scales constant and positive, zero points 0 in int8, rounded tensors with one scale, weights along their output channels, biases in float."""
    constants = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    found = []
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = constants.get(node.input[1]), constants.get(node.input[2]) if len(node.input) > 2 else None
        if scale is None or not np.all(np.isfinite(scale) & (scale > 0)):
            found.append(f"{node.name}: its scale is no positive constant")
        elif zero is None or zero.dtype != np.int8 or np.any(zero):
            found.append(f"{node.name}: its zero point is not 0 in int8")
        elif node.op_type == "QuantizeLinear" and scale.ndim:
            found.append(f"{node.name}: a rounded tensor with several scales")
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants and constants[node.input[0]].dtype != np.int8:
            found.append(f"{node.name}: a constant that is no int8")
        elif scale.ndim:
            axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
            found += [f"{node.name}: axis {axis}" for kind in readers[node.output[0]] if CHANNELS.get(kind, axis) != axis]
    return found


PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Slice", "Gather", "Identity", "MaxPool", "Split")
SETTINGS = {"global_quantization_settings": {"skip_tail_quantization": False}, "deployment_settings": {"target_framework": "tensorrt"}}


@dataclass
class File:
    """A file, and where each of its tensors comes from."""

    quantized: Any
    model: Any

    def __post_init__(self) -> None:
        self.makers = {output: node for node in self.model.graph.node for output in node.output}
        self.constants = {entry.name for entry in self.model.graph.initializer}

    def origin(self, name: str) -> Any:
        """The node that makes a tensor, seen through those that only move values; `None` of an input or a constant."""
        node = self.makers.get(name)
        while node is not None and node.op_type in MOVES:
            node = self.makers.get(node.input[0])
        return node

    def maker(self, name: str) -> str:
        """Its operator."""
        node = self.origin(name)
        return "" if node is None else str(node.op_type)

    def reads_weights(self, node: Any) -> bool:
        """Whether an operand of a product is a constant of integers."""
        found = [self.origin(name) for name in node.input[:2]]
        return any(maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in self.constants for maker in found)

    def mixed_products(self) -> list[str]:
        """Products of a rounded tensor with one that is not: TensorRT multiplies both in one type, so that the rounding buys nothing."""
        products = [node for node in self.model.graph.node if node.op_type in PRODUCTS and not set(node.input[:2]) & self.constants]
        return [node.name for node in products if len({self.maker(name) == "DequantizeLinear" for name in node.input[:2]}) == 2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], File]:
    @functools.cache
    def export(name: str) -> File:
        make, example, _ = MODELS[name]
        quantized, _ = calibrated(make(), example, SETTINGS)
        path = tmp_path_factory.mktemp("tensorrt") / "model.onnx"
        quantized.export(path, check=False)
        return File(quantized, onnx.load(path))

    return export


@pytest.mark.parametrize("name", MODELS)
def test_a_file_breaks_no_rule(name: str, exported: Callable[[str], File]) -> None:
    file = exported(name)
    assert violations(file.model) == []
    assert file.mixed_products() == []


def test_a_rule_that_is_broken_is_found(exported: Callable[[str], File]) -> None:
    model = copy.deepcopy(exported("cnn").model)
    node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    scale = next(entry for entry in model.graph.initializer if entry.name == node.input[1])
    scale.CopyFrom(numpy_helper.from_array(np.float32(-1), scale.name))
    assert any("no positive constant" in what for what in violations(model))


@pytest.mark.parametrize("name", ["residual", "resnet18", "mobilenet"])
def test_an_addition_takes_in_one_convolution_before_it_is_rounded(name: str, exported: Callable[[str], File]) -> None:
    # "Q/DQ on the shortcut only": convolution, batch norm, addition and ReLU are one kernel.
    file = exported(name)
    additions = [sorted(map(file.maker, node.input)) for node in file.model.graph.node if node.op_type == "Add"]
    assert additions
    assert all(makers == ["Conv", "DequantizeLinear"] for makers in additions)
    plan = file.quantized.plan
    assert all(plan.fused_before(layer.name)[-1].startswith("conv") for layer in file.quantized.graph if layer.kind == "add")
    assert not any(key.layer in plan.groups for key in plan.tensors)


def test_other_engines_round_both_operands_of_an_addition() -> None:
    quantized, _ = calibrated(ResidualCNN(), ResidualCNN.example)
    assert all(not quantized.plan.fused_before(layer.name) for layer in quantized.graph if layer.kind == "add")


class Attention(nn.Module):
    """By two products in the open, or in one call."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.qkv, self.out = fused, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return self.out((q @ k.transpose(1, 2) / 4).softmax(-1) @ v)


@pytest.mark.parametrize("fused", [True, False])
def test_both_products_of_attention_are_in_one_type(fused: bool, tmp_path: Path) -> None:
    quantized, _ = calibrated(Attention(fused), lambda: torch.randn(2, 5, 16), SETTINGS)
    quantized.export(tmp_path / "model.onnx", check=False)
    file = File(quantized, onnx.load(tmp_path / "model.onnx"))
    products = [node for node in file.model.graph.node if node.op_type == "MatMul" and not file.reads_weights(node)]
    makers = [{file.maker(name) for name in node.input} for node in products]
    assert makers == ([{"Add"}, {"Softmax", "Add"}] if fused else [{"DequantizeLinear"}, {"DequantizeLinear"}])
