"""What is known of each layer with weights: how many, in how many channels, how often they are multiplied, and whose they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_cco.quantization.arguments import at
from lightning_cco.quantization.forward_call import Forward
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.phases import Phase
from lightning_cco.quantization.sites import SiteQuantizers


@dataclass(frozen=True)
class WeightFacts:
    """The weights of one layer.

    Attributes:
        elements: How many numbers they are.
        channels: How many scales they have.
        grouped: Whether these are of groups of weights, which files store in 4 bits where they fit.
        products: Multiplications with them on one batch.
        memory: Where they lie: layers that read the same weights read the same memory.
    """

    elements: int
    channels: int
    products: int
    memory: tuple[int, ...]
    grouped: bool = False


def weight_facts(quantized: HookedModel, batch: Any, forward: Forward) -> dict[str, WeightFacts]:
    """The facts of each layer whose weights are quantized, from one forward in float.

    Args:
        quantized: The hooked model.
        batch: One batch, on its device.
        forward: How it goes through the model.
    """
    found: dict[str, WeightFacts] = {}

    def look(site: SiteQuantizers, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [(at(args, kwargs, slot), quantizer) for slot, quantizer in site.weights]
        read = next((value for value in args if isinstance(value, Tensor)), None)
        result = func(*args, **kwargs)
        if tensors:
            kind = quantized.graph[site.layer].kind
            before = found.get(site.layer)
            products = _products(kind, [tensor for tensor, _ in tensors], read, result) + (before.products if before else 0)
            elements = sum(tensor.numel() for tensor, _ in tensors)
            channels = sum(quantizer.scales_of(tensor) for tensor, quantizer in tensors)
            grouped = any(quantizer.group is not None for _, quantizer in tensors)
            memory = tuple(tensor.untyped_storage().data_ptr() for tensor, _ in tensors)
            found[site.layer] = WeightFacts(elements, channels, products, memory, grouped)
        return result

    with quantized.evaluating(), quantized.forked_random(), quantized.runtime.doing(Phase.DELEGATE, look):
        forward(quantized.model, batch)
    return found


def _products(kind: str, weights: list[Tensor], read: Tensor | None, result: Any) -> int:
    """How many multiplications a layer's call does with its weights."""
    if kind in ("embedding", "embedding_bag"):
        return 0
    weight = weights[0]
    if kind == "conv" and isinstance(result, Tensor):
        return int(result.numel() * weight[0].numel())
    if kind == "conv_transpose" and read is not None:
        return int(read.numel() * weight[0].numel())
    if kind in ("lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell") and read is not None:
        return int(read.numel() // max(1, read.shape[-1])) * sum(tensor.numel() for tensor in weights)
    if isinstance(result, Tensor) and weight.dim() >= 2:
        return int(result.numel() * weight.shape[-1 if kind == "linear" else -2])
    return int(result.numel()) if isinstance(result, Tensor) else 0


def float_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters and floating-point buffers in float32, each tensor once: what `ExportReport.size_ratio` is relative to."""
    tensors = {id(t): t for _, t in [*model.named_parameters(), *model.named_buffers()] if t.is_floating_point()}
    return sum(4 * tensor.numel() for tensor in tensors.values())
