"""Small files made by hand, with and without a feature that an engine requires, and what the engine makes of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper


class File:
    """Writes nodes one after the other.

    Args:
        opset: Opset of the file.
    """

    def __init__(self, opset: int = 20) -> None:
        self.opset, self.nodes, self.constants, self.random = opset, [], [], np.random.default_rng(0)
        self.steps: dict[str, tuple[str, str]] = {}

    def constant(self, array: Any) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def rounded(self, x: str, scale: float = 0.02, zero_point: int = 128, kind: Any = np.uint8, clip: tuple[int, int] | None = None) -> str:
        """A pair of QuantizeLinear and DequantizeLinear, with a Clip of the integers between them."""
        step, zero = self.constant(np.float32(scale)), self.constant(kind(zero_point))
        levels = self.node("QuantizeLinear", x, step, zero)
        if clip is not None:
            levels = self.node("Clip", levels, *(self.constant(kind(level)) for level in clip))
        return self.node("DequantizeLinear", levels, step, zero)

    def weight(self, *shape: int, axis: int = 0, kind: Any = np.int8, most: int = 63, zeros: str | None = None) -> str:
        """Integers of at most 7 bits, whose sums no processor cuts off, and their DequantizeLinear."""
        center = 128 if kind is np.uint8 else 0
        integers = (self.random.integers(-most, most + 1, shape) + center).astype(kind)
        scales = self.constant(np.full(shape[axis], 0.01, np.float32))
        zeros = zeros or self.constant(np.full(shape[axis], center, kind))
        return self.node("DequantizeLinear", self.constant(integers), scales, zeros, axis=axis)

    def save(self, path: Path, shape: tuple[Any, ...], output: str) -> Path:
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("x", 1, shape)],
            [helper.make_tensor_value_info(output, 1, None)],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        onnx.save(model, path)
        return path


def optimized(path: Path) -> Counter[str]:
    """Operators of the graph that ONNX Runtime makes of a file."""
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(path.with_suffix(".optimized.onnx"))
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path.with_suffix(".optimized.onnx")).graph.node)


def reference(path: Path, x: np.ndarray) -> np.ndarray:
    """What the operators of a file compute, one by one."""
    options = ort.SessionOptions()
    options.log_severity_level, options.graph_optimization_level = 3, ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def agrees(got: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.square(got - expected).sum() < 1e-4 * np.square(expected).sum())
