"""Calls of layers, spelled so that the exporter writes operators that engines run in integers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_cco.export.engine_patterns import added_apart, attention, divided, in_slices, multiplied_apart, sorted_maximum
from lightning_cco.export.engines import FileFeature
from lightning_cco.export.exporter_spellings import for_the_exporter
from lightning_cco.export.pooling_as_convolution import averaged_in_float
from lightning_cco.export.stored_tensors import StoredWeights
from lightning_cco.graph.call import ArgPath
from lightning_cco.graph.captured import CallSite
from lightning_cco.graph.einsum_equations import einsum_by_matmul
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.quantization.tensor_key import TensorKey


def as_engines_want(
    site: CallSite, func: Callable[..., Any], kwargs: dict[str, Any], quantized: HookedModel, stored: StoredWeights
) -> Callable[..., Any]:
    """The same function as an engine has an INT8 kernel for it.

    Args:
        site: The call.
        func: Its function.
        kwargs: Its keyword arguments.
        quantized: The model.
        stored: What the file stores of it.
    """
    kind = site.op.kind
    if kind == "addmm" and not site.in_place and _adds_apart(site, kwargs, quantized.plan, stored):
        return added_apart
    if _stands_apart(site, quantized.plan):
        return multiplied_apart if kind == "matmul" else partial(einsum_by_matmul, multiply=multiplied_apart)
    if site.function == "avg_pool2d" and stored.engine.requires(FileFeature.POOLS_AS_CONVOLUTIONS):
        return averaged_in_float
    if kind == "avg_pool":
        return divided(func)
    if kind == "amax" and stored.engine.requires(FileFeature.SORTED_MAXIMA):
        return sorted_maximum
    if kind in ("chunk", "split", "tensor_split"):
        return in_slices(func)
    spelled: dict[str, Callable[..., Any]] = {"scaled_dot_product_attention": attention, "einsum": einsum_by_matmul}
    return spelled.get(kind) or for_the_exporter(quantized.graph[site.layer], func)


def _adds_apart(site: CallSite, kwargs: dict[str, Any], plan: QuantizationPlan, stored: StoredWeights) -> bool:
    """Whether the addend of `torch.addmm` is none that engines add to a product in integers."""
    planned = site.layer in plan.quantized and site.layer not in stored.biases
    return planned or len(site.sources) > 1 or kwargs.get("beta", 1) != 1


def _stands_apart(site: CallSite, plan: QuantizationPlan) -> bool:
    """Whether a product with a weight at its right is planned in integers, and not rounded: engines would put together with it what is added then."""
    right: dict[str, list[ArgPath]] = {"matmul": [(1,)], "einsum": [(2,), (1, 1)]}
    slots = [weight.slot in right.get(site.op.kind, []) for weight in site.weights]
    end = plan.end_of_group(site.layer)  # a clamp after it, with which it is rounded
    return (
        slots == [True]
        and len(site.sources) == 1
        and not site.in_place
        and site.layer in plan.quantized
        and not plan.rounds(TensorKey(end))
    )
