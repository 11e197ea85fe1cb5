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

_SMOOTH = frozenset({"sigmoid", "leaky_relu", "tanh", "prelu", "hardswish", "hardsigmoid"})


@dataclass(frozen=True)
class Target:
    """An inference engine.

    Attributes:
        name: The word for it in `DeploymentSettings.target_framework`.
        symmetric_activations: Whether activations must have zero point 0.
        int8_kinds: Layer kinds that the engine computes in INT8. Others read and write INT8 tensors but compute in float between them.
        float_outputs: Kinds among them whose result the engine hands over in float at no cost. It is rounded only where an INT8 layer reads it.
        followers: Kinds that multiply no weights. They run in INT8 if all that they read is INT8 anyway or something that reads them is; between float
            layers (a residual stream between layer norms) the conversions would cost more than they save.
        channel_multiple: How many input channels the fast convolution kernels read at a time.
        integer_bias: Whether a bias is stored as integers on the grid of the accumulator; else in float.
        matrix_unit_depth: From how many products per output on a convolution runs faster on a processor's matrix units (AMX) than in the engine's own
            convolution kernel, which does not use them; `None`: the engine decides by itself.
        integer_indexing: Whether indexing is written on integers, since the engine does not move conversions past it.
        own_zero_points: Whether no two weights may share a zero point's constant.
        split_products: Whether the parts that a linear layer's result is split into are computed faster as products of their own.
    """

    name: str
    symmetric_activations: bool
    int8_kinds: frozenset[str]
    float_outputs: frozenset[str] = _WEIGHTED - {"conv", "conv_transpose"} | _MATMUL
    followers: frozenset[str] = _ELEMENTWISE | _SHAPING | _SMOOTH
    channel_multiple: int = 1
    integer_bias: bool = True
    matrix_unit_depth: int | None = None
    integer_indexing: bool = False
    own_zero_points: bool = False
    split_products: bool = False


_ALL = _WEIGHTED | _MATMUL | _CLAMP | _ELEMENTWISE | _SHAPING

TARGETS: Mapping[str, Target] = {
    "ort": Target(
        "ort",
        False,
        _ALL - {"scaled_dot_product_attention"} | {"sigmoid", "leaky_relu"},
        channel_multiple=4,
        matrix_unit_depth=1024,
        integer_indexing=True,
        own_zero_points=True,
        split_products=True,
    ),
    "openvino": Target("openvino", False, _ALL | _SMOOTH, own_zero_points=True),
    "tensorrt": Target("tensorrt", True, _ALL, integer_bias=False),
}
"""The engines by name. Sources: ONNX Runtime's QDQ operator list, OpenVINO's low-precision transformations guide, TensorRT's Q/DQ placement guide.

ONNX Runtime multiplies two activations in INT8 no faster than in float, and the softmax between attention's products is slower; so attention is left in
float there (measured by `benchmarks/export_latency.py`).
"""
