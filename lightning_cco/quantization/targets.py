"""What each engine runs in INT8, which decides the plan. What it wants of a file is in `lightning_cco.export.engines`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from lightning_cco.graph.layer import Layer
from lightning_cco.quantization.int8_conditions import (
    averages_images,
    averages_to_one,
    averages_windows,
    by_a_matrix,
    divides_by_count,
    flat,
    floats_alone,
    nearest,
    pools_evenly,
    transposed_whole,
    two_activations_or_channels,
    two_operands,
    ungrouped,
    weight_last,
    weight_second,
)

_CELLS = frozenset({"lstm_cell", "gru_cell", "rnn_cell"})
_RECURRENT = frozenset({"lstm", "gru", "rnn"}) | _CELLS
_WEIGHTED = frozenset({"conv", "conv_transpose", "linear", "embedding", "embedding_bag"}) | _RECURRENT
_MATMUL = frozenset({"matmul", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention"})
_CLAMP = frozenset({"relu", "relu6", "hardtanh", "clamp"})
_ELEMENTWISE = frozenset({"add", "sub", "mul", "div"})
_SHAPING = frozenset({"concat", "stack", "interpolate", "avg_pool", "adaptive_avg_pool", "mean"})

_SMOOTH = frozenset({"sigmoid", "leaky_relu", "tanh", "prelu", "hardswish", "hardsigmoid"})

Int8Condition = Callable[[Layer], bool]
"""Whether an engine has an INT8 kernel for a layer of some kind."""


@dataclass(frozen=True)
class Target:
    """What an inference engine computes in INT8, which decides the plan.

    Attributes:
        name: The word for it in `DeploymentSettings.target_framework`.
        symmetric_activations: Whether activations must have zero point 0.
        int8_kinds: Layer kinds that the engine computes in INT8. It computes others in float.
        weight_only_kinds: Kinds with weights that it computes in float from integer weights: nothing is rounded for what they read.
        int8_conditions: For kinds of which it computes only some layers in INT8, which those are; another layer with weights is weight-only, or in
            float where `float_products` is false.
        float_outputs: Kinds among them whose result the engine gives in float without a conversion. It is rounded only where an INT8 layer reads it.
        integer_outputs: Kinds that it computes in INT8 only where their result is rounded.
        adds_before_rounding: Kinds to whose result it adds another tensor before it rounds: such a result is not rounded, the other tensor is.
        followed_in_float: Kinds whose rounded result alone is no reason to run the addition after them in INT8: another INT8 layer has to read its sum. So a
            transformer's residual stream is not rounded where the engine wants the results of linear layers rounded.
        float_products: Whether it multiplies floats with weights that are stored as integers; else a layer in float has weights in float.
        norms: Whether a batch norm that is folded into no layer has an INT8 kernel: a convolution of each channel with one number. A dense block of six on one
            thread: 8.2 ms against 9.0 in float with ONNX Runtime 1.32, 7.7 against 8.5 with OpenVINO 2026.4 (``benchmarks/file_features.py norms``).
        made_weights: Kinds with weights of which it has an INT8 kernel also where another layer makes the weight; where one makes the bias it has none.
        integer_left: Which products with a weight on their left, which are computed in float, may have integers for it; `None`: all.
        narrow_without_vnni: Whether weights have 7 bits for x86 processors without VNNI, whose 16-bit sums of two 8-bit products saturate.
        refuses_int4: Why weights can't be stored in 4 bits for it; empty: they can.
        refuses_groups: Why weights can't have a scale for each group of inputs for it, nor zero points, and what to write instead; empty: they can.
        refuses_dynamic: Why nothing is rounded by a range that is found when it runs, and what to write instead; empty: it rounds, in blocks of as many values
            as there are weights in a group, what a product with weights alone in integers reads.
    """

    name: str
    symmetric_activations: bool
    int8_kinds: frozenset[str]
    weight_only_kinds: frozenset[str] = frozenset()
    int8_conditions: Mapping[str, Int8Condition] | None = None
    float_outputs: frozenset[str] = _WEIGHTED - {"conv", "conv_transpose"} | _MATMUL
    integer_outputs: frozenset[str] = frozenset()
    adds_before_rounding: frozenset[str] = frozenset()
    followed_in_float: frozenset[str] = frozenset()
    float_products: bool = True
    norms: bool = False
    made_weights: frozenset[str] = frozenset()
    integer_left: Int8Condition | None = None
    narrow_without_vnni: bool = False
    refuses_int4: str = ""
    refuses_groups: str = ""
    refuses_dynamic: str = "was not tried with it. Leave activations_dynamic out, or choose target_framework: ort"

    @cached_property
    def elementwise_kinds(self) -> frozenset[str]:
        """Kinds that multiply no weights and are no clamps.

        They run in INT8 if all that they read is INT8 anyway, or if an INT8 layer reads them and one of several tensors that they read is; between float
        layers (a residual stream between layer norms) the conversions would cost more than they save.
        """
        return self.int8_kinds - _WEIGHTED - _MATMUL - _CLAMP

    def gives_int8(self, kind: str) -> bool:
        """Whether a sum or a product gets the result of an INT8 layer of a kind in INT8, where nothing else asks for it.

        What a convolution gives is INT8 for any engine here: they take the sum of images after it into it.
        """
        return kind not in (self.float_outputs | self.followed_in_float) - {"conv"}

    def computes_in_int8(self, layer: Layer) -> bool:
        """Whether a layer, all of whose floats are rounded, is computed in INT8."""
        runs = (self.int8_conditions or {}).get(layer.kind)
        if layer.attributes.get("made_bias") or (layer.attributes.get("made_weight") and layer.kind not in self.made_weights):
            return False
        return layer.kind in self.int8_kinds and (runs is None or runs(layer))

    def weight_bits(self, layer: Layer, bits: int, vnni: bool | None) -> int:
        """Bits of a layer's weight where the settings say so many, for a processor with or without VNNI (`None`: not known)."""
        narrow = self.narrow_without_vnni and vnni is False and layer.kind not in ("embedding", "embedding_bag")
        return min(bits, 7) if narrow else bits

    def stores_weights(self, layer: Layer) -> bool:
        """Whether a layer that is computed in float has integer weights in the file."""
        if self.integer_left is not None and not weight_last(layer) and not self.integer_left(layer):
            return False
        return layer.weighted and (layer.kind in self.weight_only_kinds or (self.float_products and layer.kind in self.int8_kinds))


def _program(name: str, *more: str, int8_conditions: Mapping[str, Int8Condition] | None = None) -> Target:
    """An engine that reads programs with quantized operators, and whose products in INT8 give rounded results alone (as XNNPACK's do)."""
    return Target(
        name,
        False,
        frozenset({*more, "conv", "linear", "add", "sub", "mul", "concat", "mean", "adaptive_avg_pool"}) | _CLAMP,
        weight_only_kinds=frozenset({"embedding", "embedding_bag"}),
        int8_conditions={
            "conv": flat,
            "conv_transpose": transposed_whole,
            "linear": weight_last,
            "add": two_operands,
            "sub": two_operands,
            "mul": two_operands,
            "mean": averages_images,
            "adaptive_avg_pool": averages_to_one,
            **(int8_conditions or {}),
        },
        float_outputs=frozenset(),
        integer_outputs=frozenset({"conv", "conv_transpose", "linear"}),
        followed_in_float=frozenset({"linear", "matmul", "embedding"}),
        float_products=False,
        refuses_int4="stores weights in 8 bits alone",
        refuses_groups="was not tried with weights in groups. Leave weights_group_size out, or choose target_framework: ort or openvino",
    )


_ALL = _WEIGHTED | _MATMUL | _CLAMP | _ELEMENTWISE | _SHAPING
_ORT_FLOAT = frozenset({"scaled_dot_product_attention", "sub", "div"})
_ORT_WEIGHT_ONLY = _RECURRENT | {"conv_transpose", "embedding_bag"}

TARGETS: Mapping[str, Target] = {
    "ort": Target(
        "ort",
        False,
        _ALL - _ORT_FLOAT - _ORT_WEIGHT_ONLY | {"sigmoid", "leaky_relu"},
        weight_only_kinds=_ORT_WEIGHT_ONLY,
        int8_conditions={
            "add": two_operands,
            "mul": two_operands,
            **dict.fromkeys(("concat", "stack"), floats_alone),
            "clamp": lambda layer: "limits" not in layer.attributes,  # a Max and a Min with tensors
            "matmul": weight_last,
            "einsum": by_a_matrix,
            "mean": averages_images,
            "adaptive_avg_pool": pools_evenly,
            "avg_pool": divides_by_count,
            "interpolate": nearest,
        },
        integer_outputs=_ELEMENTWISE | _SHAPING | _SMOOTH | {"conv", "batch_norm"},
        norms=True,
        made_weights=frozenset({"conv", "linear"}),
        refuses_dynamic="",
        # 1.32 multiplies such a weight by rows that are rounded in an operator that refuses a scale for each of its rows, when the file runs.
        integer_left=lambda layer: len(layer.input_shapes[0]) > 2,
    ),
    "openvino": Target(
        "openvino",
        False,
        # It makes a power and a product in float of a division.
        _ALL - _RECURRENT - {"scaled_dot_product_attention", "conv_transpose", "embedding_bag", "div"},
        # It compiles LSTM, GRU and RNN from float constants only, and rounds what a cell multiplies with integer weights by itself.
        # Its transposed convolution in INT8 wants sizes that are fixed, and AVX-512.
        weight_only_kinds=frozenset({"conv_transpose", "embedding_bag"}),
        int8_conditions={
            # A sum with a parameter is taken into the convolution before it, or into the rounding of its result, by channels; else it is one of floats.
            "add": two_activations_or_channels,
            "sub": two_activations_or_channels,
            "mul": two_operands,
            "matmul": weight_second,
            "einsum": weight_second,
            "addmm": weight_second,
            "baddbmm": weight_second,
            "interpolate": nearest,
            "adaptive_avg_pool": pools_evenly,
        },
        float_outputs=_WEIGHTED | _MATMUL | {"batch_norm"},
        integer_left=lambda layer: False,  # 2026.4 refuses such a file, or is wrong by a tenth
        refuses_dynamic="decides by itself, by processor and by its own settings, what it rounds when it runs. Leave activations_dynamic out, or choose "
        "target_framework: ort",
        narrow_without_vnni=True,
    ),
    "tensorrt": Target(
        "tensorrt",
        True,
        # Its attention in one kernel is one of 16-bit floats. With integers for the second product the softmax would have to be rounded, inside of one call.
        _ALL - _RECURRENT - {"scaled_dot_product_attention"},
        weight_only_kinds=_RECURRENT,
        # Convolution, batch norm, addition and ReLU are one kernel where only the shortcut has a Q/DQ pair; one more before the addition is "suboptimal".
        adds_before_rounding=frozenset({"conv"}),
        refuses_int4="takes 4-bit weights in blocks only",
        # It takes int4 in blocks of 64 or 128, and the file's opset of blocks takes no symmetric activations in ONNX Runtime (`FileFeature.OPSET`).
        refuses_groups="was not tried with weights in groups. Leave weights_group_size out, or choose target_framework: ort or openvino",
    ),
    "executorch": _program("executorch", "conv_transpose"),
    "litert": _program("litert", "avg_pool", int8_conditions=dict.fromkeys(("avg_pool", "adaptive_avg_pool"), averages_windows)),
    "coreml": _program("coreml", "conv_transpose"),
    "qnn": Target(
        "qnn",
        False,
        frozenset({"conv", "conv_transpose", "linear", "matmul"}) | _CLAMP | _ELEMENTWISE | _SHAPING | _SMOOTH - {"prelu"},
        int8_conditions={
            "conv_transpose": ungrouped,
            "linear": weight_last,
            "matmul": weight_second,
            "add": two_operands,
            "sub": two_operands,
            "mul": two_operands,
            "div": two_operands,
            "concat": floats_alone,
            "stack": floats_alone,
            "mean": averages_images,
            "adaptive_avg_pool": averages_to_one,
            "avg_pool": divides_by_count,
            "interpolate": nearest,
        },
        float_outputs=frozenset(),
        integer_outputs=_WEIGHTED | _MATMUL | _ELEMENTWISE | _SHAPING | _SMOOTH,
        followed_in_float=frozenset({"linear", "matmul", "embedding"}),
        float_products=False,
        refuses_int4="was not tried with weights in 4 bits",
        refuses_groups="was not tried with weights in groups. Leave weights_group_size out, or choose target_framework: ort or openvino",
    ),
}
"""The engines by name. Sources: ONNX Runtime's QDQ operator list and the graphs that it makes of each kind; OpenVINO's low-precision transformations guide,
TensorRT's Q/DQ placement guide.

ONNX Runtime multiplies two activations in INT8 no faster than in float, and the softmax between attention's products is slower; so attention is left in
float there (measured by `benchmarks/export_latency.py`).
"""
