"""Activations that are rounded by ranges found when the model runs: which layers read them, in which blocks, and their rounding.

ONNX Runtime's ``MatMulNBits`` with ``accuracy_level`` 4 cuts each row that it multiplies into blocks as long as those of its weights, and rounds each block to
int8, zero point 0: ``round(x * (127 / max(|x|)))`` by the scale ``max(|x|) / 127`` (seen in 1.32 on x86-64 with AVX512 VNNI: 130 dB and more to such a product,
with blocks of 16 to 256 weights of 4 and 8 bits, symmetric or not; 28 to 47 dB to one of a scale for the whole row).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cco.errors import CCOError
from lightning_cco.graph.call import ArgPath
from lightning_cco.graph.captured import CallSite
from lightning_cco.graph.layer import Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.quantization.differentiable_operations import straight_through
from lightning_cco.quantization.native import kernels_for
from lightning_cco.quantization.rules import BY_ITSELF, ResolvedRules
from lightning_cco.quantization.targets import Target
from lightning_cco.quantization.tracing import runs_plainly, without_gradient
from lightning_cco.quantization.weight_groups import fitting_groups, grouped_inputs
from lightning_cco.settings import GlobalQuantizationSettings

LIMIT = 127
PRODUCTS = frozenset({"linear", "matmul", "addmm"})


class DynamicQuantizer(nn.Module):
    """Rounds to int8, symmetric, with the scale of the largest magnitude in each block of a row; the gradient is that of the identity.

    Args:
        block: How many values share a scale.

    Example:
        >>> import torch
        >>> DynamicQuantizer(2)(torch.tensor([[127.0, 1.4, 0.6, -12.7]]))
        tensor([[127.0000,   1.0000,   0.6000, -12.7000]])
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Round.

        Args:
            x: (…, values), any float type; a multiple of a block's.
        """
        rows = x.reshape(-1, self.block)
        if not torch.compiler.is_compiling() and not runs_plainly():
            return straight_through(_by_torch(without_gradient(rows)), rows).view(x.shape)
        result: Tensor = _Round.apply(rows)  # type: ignore[no-untyped-call]
        return result.view(x.shape)

    def steps(self, x: Tensor) -> Tensor:
        """The scale of each value, float32, in the shape of ``x``."""
        scale = _largest(x.reshape(-1, self.block)) / LIMIT
        return scale.expand(-1, self.block).reshape(x.shape)

    def extra_repr(self) -> str:
        """Size of a block."""
        return f"blocks of {self.block}"


def _largest(rows: Tensor) -> Tensor:
    return rows.detach().abs().amax(1, keepdim=True).float()


def _by_torch(rows: Tensor) -> Tensor:
    """As the engine does it: by ``127 / max(|x|)``, which is not always ``1 / (max(|x|) / 127)``, and a value in the middle goes the other way.

    A block whose factor float32 can't hold (``max(|x|)`` below 3.8e-37: what GELU or a softmax leaves of values far off) is 0.
    """
    largest = _largest(rows)
    inverse = torch.full_like(largest, LIMIT).div(largest)  # a number by a tensor is two roundings
    inverse = inverse.masked_fill(inverse.isposinf(), 0.0)
    values = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    return ((values * inverse).round() * (largest / LIMIT)).to(rows.dtype)


class _Round(torch.autograd.Function):
    """By a kernel, or by torch operations."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        kernels = None if torch.compiler.is_compiling() else kernels_for(rows)
        if kernels is None or not rows.is_contiguous():
            return _by_torch(rows)
        result = torch.empty_like(rows, requires_grad=False)
        kernels.fake_quantize_rows(rows, result, LIMIT)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def find_dynamic(
    graph: LayerGraph, overall: GlobalQuantizationSettings, rules: Mapping[str, ResolvedRules], target: Target, groups: Mapping[str, int]
) -> dict[str, int]:
    """The layers that round what they read when they run, and in blocks of how many values.

    Raises:
        CCOError: A rule names a layer itself that can't, or the engine can't.
    """
    found = {}
    for layer in graph:
        entry = rules.get(layer.name, ResolvedRules())
        if not wanted_dynamic(overall, entry):
            continue
        why = not_dynamic(layer)
        if not why:
            if target.refuses_dynamic:
                raise CCOError(f"activations_dynamic: true with target_framework: {target.name}, which {target.refuses_dynamic}.")
            found[layer.name] = groups.get(layer.name) or fitting_groups(layer)[-1]
        elif entry.activations_dynamic and entry.dynamic_exactness >= BY_ITSELF:
            raise CCOError(f"layer_settings: {entry.dynamic_by} sets activations_dynamic: true, but {why}.")
    return found


def wanted_dynamic(overall: GlobalQuantizationSettings, entry: ResolvedRules) -> bool:
    """Whether the settings want a layer to round what it reads when it runs, whether it can or not."""
    if entry.weight_only is False and entry.weight_only_exactness >= entry.dynamic_exactness:
        return False
    return entry.activations_dynamic if entry.activations_dynamic is not None else overall.activations_dynamic


def not_dynamic(layer: Layer) -> str:
    """Why a layer can't round what it reads when it runs, and what to write instead; empty if it can."""
    if layer.kind not in PRODUCTS or grouped_inputs(layer) is None or not layer.input_shapes:
        return (
            f"layer '{layer.name}' (kind {layer.kind}) can't: expected a linear layer or a product with a matrix of weights on its right. Leave "
            "activations_dynamic out for it, or write false"
        )
    if not fitting_groups(layer):
        return (
            f"layer '{layer.name}' has {grouped_inputs(layer)} inputs, and none of 16 to 256 divides them, as the blocks do in which engines round. Write "
            "activations_dynamic: false for it"
        )
    return ""


def dynamic_slot(site: CallSite) -> ArgPath | None:
    """The argument of a call that is dynamically quantized; `None` if it is a constant."""
    if not site.sources:
        return None
    return site.sources[-1 if site.op.kind == "addmm" else 0].slot
