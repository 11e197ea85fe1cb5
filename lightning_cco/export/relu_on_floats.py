"""A ReLU on floats after a product in integers, as a Max with 0: ONNX Runtime fuses a linear layer and a ReLU into one operator on floats."""

from __future__ import annotations

from torch import Tensor

from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.quantization.tensor_key import TensorKey


def relus_on_floats(plan: QuantizationPlan) -> frozenset[str]:
    """The ReLUs that stay in float and read what a layer in INT8 makes.

    Args:
        plan: What is quantized.
    """
    found = set()
    for edge in plan.graph.edges:
        origin = plan.origins.get(TensorKey(edge.source, edge.source_output), TensorKey(edge.source, edge.source_output))
        if plan.graph[edge.destination].kind == "relu" and edge.destination in plan.skipped and origin.layer in plan.quantized:
            found.add(edge.destination)
    return frozenset(found)


def maximum(x: Tensor, inplace: bool = False) -> Tensor:
    """`torch.relu` by another operator.

    >>> import torch
    >>> maximum(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """
    return x.clamp_(min=0) if inplace else x.clamp(min=0)


def maximum_in_place(x: Tensor, inplace: bool = True) -> Tensor:
    """`torch.relu_` by another operator."""
    return maximum(x, inplace)
