"""A ReLU on floats after a product in integers, as a Max with 0: ONNX Runtime fuses a linear layer and a ReLU into one operator on floats."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_cco.export.fusion_barriers import goes_to_roundings, maker_of, reads_rounded
from lightning_cco.export.onnx_passes import constant, initializer


def relus_as_maxima(graph: Any) -> None:
    """Write each ReLU that is not rounded, of a product of rounded tensors, as a Max; also one of the step's own, outside of all layers."""
    zero = None
    for node in list(graph):
        if node.op_type != "Relu" or goes_to_roundings(node) or not _is_of_a_product(node.inputs[0]):
            continue
        zero = zero or initializer(graph, "zero_of_maxima", np.zeros((), np.float32))
        node.op_type = "Max"
        node.resize_inputs(2)
        node.replace_input_with(1, zero)


def _is_of_a_product(value: Any) -> bool:
    """Whether a value is a linear layer's result in integers, past what only moves values."""
    maker = maker_of(value)
    if maker is not None and maker.op_type == "Add":
        products = [one.producer() for one, other in (maker.inputs, maker.inputs[::-1]) if constant(other) is not None]
        maker = next((product for product in products if product is not None), None)
    return maker is not None and maker.op_type in ("Gemm", "MatMul") and all(map(reads_rounded, maker.inputs[:2]))
