"""What the documentation says of the targets is what their tables say."""

from __future__ import annotations

import pytest

from lightning_cco.quantization.targets import TARGETS


@pytest.mark.parametrize(
    ("target", "more", "fewer"),
    [
        ("openvino", {"sub"}, {"sigmoid", "leaky_relu"}),
        ("tensorrt", {"sub", "div", "conv_transpose", "embedding_bag"}, {"sigmoid", "leaky_relu"}),
        ("litert", {"sub"}, None),
        ("qnn", {"sub", "div", "conv_transpose", "hardsigmoid", "hardswish", "tanh"}, {"addmm", "baddbmm", "einsum", "embedding"}),
    ],
)
def test_the_pages_say_what_an_engine_computes_in_int8_beside_onnx_runtime(target: str, more: set[str], fewer: set[str] | None) -> None:
    """If this fails, change the row in docs/export.md and the page of the engine, too."""
    assert TARGETS[target].int8_kinds - TARGETS["ort"].int8_kinds == more
    if fewer is not None:
        assert TARGETS["ort"].int8_kinds - TARGETS[target].int8_kinds == fewer


def test_coreml_plans_as_executorch() -> None:
    assert TARGETS["coreml"].int8_kinds == TARGETS["executorch"].int8_kinds
