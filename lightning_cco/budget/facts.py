"""What is known of each layer with weights: how many, in how many channels, how often they are multiplied, and whose they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lightning_cco.graph.containers import tensors_in
from lightning_cco.graph.multiplications import multiplications
from lightning_cco.graph.ops import operation_of_kind
from lightning_cco.quantization.call_arguments import at
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
        result = func(*args, **kwargs)
        if tensors:
            before = found.get(site.layer)
            outputs = [value for _, value in tensors_in(result)]
            products = multiplications(
                operation_of_kind(quantized.graph[site.layer].kind), args, outputs, [tensor for tensor, _ in tensors]
            )
            products += before.products if before else 0
            elements = sum(tensor.numel() for tensor, _ in tensors)
            channels = sum(quantizer.scales_of(tensor) for tensor, quantizer in tensors)
            grouped = any(quantizer.group is not None for _, quantizer in tensors)
            memory = tuple(tensor.untyped_storage().data_ptr() for tensor, _ in tensors)
            found[site.layer] = WeightFacts(elements, channels, products, memory, grouped)
        return result

    with quantized.evaluating(), quantized.forked_random(), quantized.runtime.doing(Phase.DELEGATE, look):
        forward(quantized.model, batch)
    return found


def float_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters and floating-point buffers in float32, each tensor once: what `ExportReport.size_ratio` is relative to."""
    tensors = {id(t): t for _, t in [*model.named_parameters(), *model.named_buffers()] if t.is_floating_point()}
    return sum(4 * tensor.numel() for tensor in tensors.values())
