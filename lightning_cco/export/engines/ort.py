"""ONNX Runtime. Sources: its QDQ operator list, and the graphs that it makes of files."""

from __future__ import annotations

from lightning_cco.export.engines.entry import Engine, FileFeature, Requirement

_CANARIES = "tests/export/test_engine_canaries.py"
_SPEED = "benchmarks/file_features.py"

ORT = Engine(
    "ort",
    "ONNX Runtime",
    (
        Requirement(
            FileFeature.CHANNEL_MULTIPLE,
            "1.20 to 1.32",
            "its convolution kernels read 4 channels at a time, so 3 of an image are slow: 7 × 7 in 0.97 instead of 0.66 ms (docs/export.md)",
            _SPEED,
            4,
        ),
        Requirement(
            FileFeature.MATRIX_UNITS,
            "1.20 to 1.32",
            "its convolution kernel does not use AMX; a weight with a zero point goes to the matrix product, which does: ResNet-18 3.6 instead of 2.8 "
            "times float; from 560 products on it is slower (docs/export.md)",
            _SPEED,
            1024,
        ),
        Requirement(
            FileFeature.INTEGER_BIAS,
            "1.20, not 1.32",
            "its operators in INT8 take integers; older versions compute a layer with a bias in float in float, 1.32 makes integers of it by itself",
            f"{_CANARIES}::test_ort_integer_bias",
        ),
        Requirement(
            FileFeature.INTEGER_INDEXING,
            "1.20 to 1.32",
            "it moves no conversion past what picks values, so the layer after it runs in float",
            f"{_CANARIES}::test_ort_integer_indexing",
        ),
        Requirement(
            FileFeature.INTEGER_CLIPS,
            "1.20 to 1.32",
            "a clamp of floats before a rounding keeps the layer before it in float",
            f"{_CANARIES}::test_ort_integer_clips",
        ),
        Requirement(
            FileFeature.OWN_ZERO_POINTS,
            "1.20 to 1.32",
            "it can't load a file with a shared one where exact products are asked for (session.x64quantprecision) without VNNI",
            f"{_CANARIES}::test_ort_own_zero_points",
        ),
        Requirement(
            FileFeature.FULL_BIASES,
            "1.20 to 1.32",
            "it takes a product of fixed sizes and a bias of one dimension for one of rows, in float",
            f"{_CANARIES}::test_ort_full_biases",
        ),
        Requirement(
            FileFeature.STORED_TRANSPOSED,
            "1.20 to 1.32",
            "it fuses the Transpose of a weight into the product before it has moved the conversions of what the product reads next to it: the layer "
            "after PyTorch's multi-head attention ran in float",
            f"{_CANARIES}::test_ort_stored_transposed",
        ),
        Requirement(
            FileFeature.SPLIT_PRODUCTS,
            "1.20 to 1.32",
            "it adds the bias and splits in passes of their own: ViT-tiny 1.47 instead of 1.57 times float (docs/export.md)",
            _SPEED,
        ),
        Requirement(
            FileFeature.UNSIGNED_WITHOUT_VNNI,
            "1.20 to 1.32",
            "it adds two products of unsigned and signed integers in 16 bits there; its product of two unsigned types is exact",
            f"{_CANARIES}::test_ort_unsigned_without_vnni",
        ),
        Requirement(
            FileFeature.BLOCK_OPERATORS,
            "1.32",
            "it makes no MatMulNBits of a DequantizeLinear whose integers something else reads as well (a tied embedding), or beside another one, and "
            "nothing of a Gather: all the weights become floats in every run",
            f"{_CANARIES}::test_ort_block_operators",
        ),
        Requirement(
            FileFeature.FLOAT_WEIGHTS,
            "not 1.20, 1.32",
            "it rounds the float weights of convolutions and products between roundings, with one scale for all: skipped layers ran in INT8",
            f"{_CANARIES}::test_ort_float_weights",
        ),
        Requirement(
            FileFeature.SEPARATE_ROUNDINGS,
            "1.20 to 1.32",
            "it computes a product of rows in float whose result is rounded for some of its readers",
            f"{_CANARIES}::test_ort_separate_roundings",
        ),
        Requirement(
            FileFeature.SEPARATE_PAIRS,
            "1.20 to 1.32",
            "of two roundings one after the other it makes one of another scale, and reads the integers of the next layer's bias by that",
            "tests/export/test_two_roundings.py::test_ort_separate_pairs",
        ),
        Requirement(
            FileFeature.RELU_AS_MAXIMUM,
            "1.32",
            "it fuses a linear layer with a ReLU after it that is not rounded into one operator on floats, before it looks for conversions",
            "tests/export/test_relu_on_floats.py::test_ort_relu_as_maximum",
        ),
        Requirement(
            FileFeature.OPSET,
            "1.32",
            "from opset 21 on it refuses its own rewriting of symmetric int8 pairs (output_dtype does not match y_zero_point)",
            f"{_CANARIES}::test_ort_opset",
            20,
        ),
    ),
)
