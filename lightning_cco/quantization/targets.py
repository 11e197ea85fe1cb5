"""What each engine runs in INT8: the one place where a deployment target decides something."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_WEIGHTED = frozenset(
    {"conv", "conv_transpose", "linear", "embedding", "embedding_bag", "lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell"}
)
_MATMUL = frozenset({"matmul", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention"})
_CLAMP = frozenset({"relu", "relu6", "hardtanh", "clamp"})
_ELEMENTWISE = frozenset({"add", "sub", "mul", "div"})
_SHAPING = frozenset({"concat", "stack", "interpolate", "avg_pool", "adaptive_avg_pool", "mean"})


@dataclass(frozen=True)
class Target:
    """An inference engine.

    Attributes:
        name: The word for it in `DeploymentSettings.target_framework`.
        symmetric_activations: Whether activations must have zero point 0.
        int8_kinds: Layer kinds that the engine computes in INT8. Others read and write INT8 tensors but compute in float between them.
    """

    name: str
    symmetric_activations: bool
    int8_kinds: frozenset[str]


TARGETS: Mapping[str, Target] = {
    "ort": Target("ort", False, _WEIGHTED | _MATMUL | _CLAMP | _ELEMENTWISE | _SHAPING | {"sigmoid", "leaky_relu"}),
    "openvino": Target(
        "openvino",
        False,
        _WEIGHTED | _MATMUL | _CLAMP | _ELEMENTWISE | _SHAPING | {"sigmoid", "leaky_relu", "tanh", "prelu", "hardswish", "hardsigmoid"},
    ),
    "tensorrt": Target("tensorrt", True, _WEIGHTED | _MATMUL | _CLAMP | _ELEMENTWISE | _SHAPING),
}
"""The engines by name. Sources: ONNX Runtime's QDQ operator list, OpenVINO's low-precision transformations guide, TensorRT's Q/DQ placement guide."""
