"""What each engine runs in INT8, which decides the plan. What it wants of a file is in `lightning_cco.export.engines`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lightning_cco.graph.einsum_equations import matrix_product
from lightning_cco.graph.layer import FLOATS, Layer

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
    """An inference engine.

    Attributes:
        name: The word for it in `DeploymentSettings.target_framework`.
        symmetric_activations: Whether activations must have zero point 0.
        int8_kinds: Layer kinds that the engine computes in INT8. It computes others in float.
        weight_only_kinds: Kinds with weights that it computes in float from integer weights: nothing is rounded for what they read.
        int8_conditions: For kinds of which it computes only some layers in INT8, which those are; another layer with weights is weight-only, or in
            float where `float_products` is false.
        float_outputs: Kinds among them whose result the engine gives in float without a conversion. It is rounded only where an INT8 layer reads it.
        integer_outputs: Kinds that it computes in INT8 only where their result is rounded.
        elementwise_kinds: Kinds that multiply no weights. They run in INT8 if all that they read is INT8 anyway or something that reads them is; between float
            layers (a residual stream between layer norms) the conversions would cost more than they save.
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
    elementwise_kinds: frozenset[str] = _ELEMENTWISE | _SHAPING | _SMOOTH
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
        if self.integer_left is not None and not _weight_last(layer) and not self.integer_left(layer):
            return False
        return layer.weighted and (layer.kind in self.weight_only_kinds or (self.float_products and layer.kind in self.int8_kinds))


def _two_operands(layer: Layer) -> bool:
    """Two tensors of floats, or one and a parameter: a number, a mask or integers beside it make no INT8 operator, nor does a factor of the second."""
    two = len(layer.input_shapes) > 1 or "operand_shape" in layer.attributes
    return two and _floats_alone(layer) and layer.attributes.get("alpha", 1) == 1


def _floats_alone(layer: Layer) -> bool:
    """No mask and no integers, which PyTorch makes floats of, among the tensors that it reads."""
    return all(dtype in FLOATS for dtype in layer.input_dtypes)


def _weight_last(layer: Layer) -> bool:
    return not layer.attributes.get("weight_first")


def _weight_second(layer: Layer) -> bool:
    """A product with a weight on its right; of two activations the second would need zero point 0."""
    return layer.weighted and _weight_last(layer)


def _by_a_matrix(layer: Layer) -> bool:
    """An einsum that is a product with a matrix of weights on its right."""
    shape = layer.attributes.get("operand_shape")
    if not layer.weighted or not _weight_last(layer) or not isinstance(shape, tuple):
        return False
    return matrix_product(layer.attributes.get("equation"), len(layer.input_shapes[0]), len(shape)) is not None


def _averages_images(layer: Layer) -> bool:
    """The mean of each whole channel of a batch of images."""
    axes, shape = layer.attributes.get("dim"), layer.input_shapes[0] if layer.input_shapes else ()
    return len(shape) == 4 and isinstance(axes, tuple) and sorted(axis % 4 for axis in axes) == [2, 3]


def _pools_evenly(layer: Layer) -> bool:
    """An adaptive pooling whose windows are all of one size and do not overlap; one window for all is known for images only."""
    before, after = layer.input_shapes[0], layer.output_shapes[0]
    spatial = list(zip(before[2:], after[2:], strict=False))
    if len(before) != len(after) or any(size % parts for size, parts in spatial):
        return False
    return len(before) == 4 or any(parts != 1 for _, parts in spatial)


def _divides_by_count(layer: Layer) -> bool:
    """An average pooling of whole windows, by their size: those that ``ceil_mode`` adds at the end are smaller."""
    return layer.attributes.get("divisor_override") is None and not layer.attributes.get("ceil_mode")


def _averages_windows(layer: Layer) -> bool:
    """An average pooling of images in whole windows without a border, which is a convolution of each channel with equal weights."""
    padding = layer.attributes.get("padding", 0)
    whole = _pools_evenly(layer) if layer.kind == "adaptive_avg_pool" else _divides_by_count(layer)
    return whole and len(layer.input_shapes[0]) == 4 and not any(padding if isinstance(padding, tuple) else (padding,))


def _nearest(layer: Layer) -> bool:
    return str(layer.attributes.get("mode", "nearest")).startswith("nearest")


def _flat(layer: Layer) -> bool:
    """A convolution of one or two dimensions."""
    return bool(layer.input_shapes) and len(layer.input_shapes[0]) <= 4


def _transposed_whole(layer: Layer) -> bool:
    """A transposed convolution of images without groups, whose weights may have a scale for each channel."""
    return bool(layer.input_shapes) and len(layer.input_shapes[0]) == 4 and layer.attributes.get("groups", 1) == 1


def _ungrouped(layer: Layer) -> bool:
    """A convolution without groups."""
    return bool(layer.attributes.get("groups", 1) == 1)


def _averages_to_one(layer: Layer) -> bool:
    """An adaptive pooling of images to one value a channel."""
    return len(layer.output_shapes[0]) == 4 and tuple(layer.output_shapes[0][2:]) == (1, 1)


def _program(name: str, *more: str, int8_conditions: Mapping[str, Int8Condition] | None = None) -> Target:
    """An engine that reads programs with quantized operators, and whose products in INT8 give rounded results alone (as XNNPACK's do)."""
    return Target(
        name,
        False,
        frozenset({*more, "conv", "linear", "add", "sub", "mul", "concat", "mean", "adaptive_avg_pool"}) | _CLAMP,
        weight_only_kinds=frozenset({"embedding", "embedding_bag"}),
        int8_conditions={
            "conv": _flat,
            "conv_transpose": _transposed_whole,
            "linear": _weight_last,
            "add": _two_operands,
            "sub": _two_operands,
            "mul": _two_operands,
            "mean": _averages_images,
            "adaptive_avg_pool": _averages_to_one,
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
            "add": _two_operands,
            "mul": _two_operands,
            **dict.fromkeys(("concat", "stack"), _floats_alone),
            "clamp": lambda layer: "limits" not in layer.attributes,  # a Max and a Min with tensors
            "matmul": _weight_last,
            "einsum": _by_a_matrix,
            "mean": _averages_images,
            "adaptive_avg_pool": _pools_evenly,
            "avg_pool": _divides_by_count,
            "interpolate": _nearest,
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
        _ALL - _RECURRENT - {"scaled_dot_product_attention", "conv_transpose", "embedding_bag"},
        # It compiles LSTM, GRU and RNN from float constants only, and rounds what a cell multiplies with integer weights by itself.
        # Its transposed convolution in INT8 wants sizes that are fixed, and AVX-512.
        weight_only_kinds=frozenset({"conv_transpose", "embedding_bag"}),
        int8_conditions={
            "add": _two_operands,
            "sub": _two_operands,
            "mul": _two_operands,
            "div": _two_operands,
            "matmul": _weight_second,
            "einsum": _weight_second,
            "addmm": _weight_second,
            "baddbmm": _weight_second,
            "interpolate": _nearest,
            "adaptive_avg_pool": _pools_evenly,
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
    "litert": _program("litert", "avg_pool", int8_conditions=dict.fromkeys(("avg_pool", "adaptive_avg_pool"), _averages_windows)),
    "coreml": _program("coreml", "conv_transpose"),
    "qnn": Target(
        "qnn",
        False,
        frozenset({"conv", "conv_transpose", "linear", "matmul"}) | _CLAMP | _ELEMENTWISE | _SHAPING | _SMOOTH - {"prelu"},
        int8_conditions={
            "conv_transpose": _ungrouped,
            "linear": _weight_last,
            "matmul": _weight_second,
            "add": _two_operands,
            "sub": _two_operands,
            "mul": _two_operands,
            "div": _two_operands,
            "concat": _floats_alone,
            "stack": _floats_alone,
            "mean": _averages_images,
            "adaptive_avg_pool": _averages_to_one,
            "avg_pool": _divides_by_count,
            "interpolate": _nearest,
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
