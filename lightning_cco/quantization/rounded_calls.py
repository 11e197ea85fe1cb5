"""A torch call with its weights and its activations rounded: what goes in, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.call_arguments import replaced
from lightning_cco.quantization.sites import SiteQuantizers
from lightning_cco.quantization.weight_recompute import RecomputedWeight, saving_recomputed


def with_inputs(
    site: SiteQuantizers, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], track: bool
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """A call whose weights and activations are rounded; by keywords, which hooks on quantizers read."""
    recomputed: list[RecomputedWeight] = []
    if site.plain_slots:  # nearly always
        items = list(args)
        for (position, *_), weight_quantizer in site.weights:
            items[position] = weight_quantizer(items[position], recomputed=recomputed)
        for (position, *_), _, quantizer in site.reads:
            items[position] = quantizer(items[position], track=track, shared=True)
        args = tuple(items)
    else:
        for slot, weight_quantizer in site.weights:
            args, kwargs = replaced(args, kwargs, slot, partial(weight_quantizer, recomputed=recomputed))
        for slot, _, quantizer in site.reads:
            args, kwargs = replaced(args, kwargs, slot, partial(quantizer, track=track, shared=True))
    args, kwargs = with_dynamic(site, args, kwargs)
    if site.correction is not None:
        args, kwargs = site.correction.applied(args, kwargs)
    return saving_recomputed(func, recomputed) if recomputed else func, args, kwargs


def with_dynamic(site: SiteQuantizers, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call that reads what is rounded by a range that is found now, if the plan says so."""
    if site.dynamic is None:
        return args, kwargs
    return replaced(args, kwargs, *site.dynamic)


def results_of(result: Any, args: tuple[Any, ...]) -> list[Any]:
    """What a call returned, as a list; an assignment returns nothing and changes its first argument."""
    if result is None:
        return [args[0]]
    return [result] if isinstance(result, Tensor) else list(result)


def with_outputs(result: Any, outputs: list[tuple[int, ActivationQuantizer]], track: bool) -> Any:
    """The results of a call that has several, some of them rounded, as what the call returned: a tuple, a named tuple or a list."""
    items = list(result)
    for position, quantizer in outputs:
        items[position] = quantizer(items[position], track=track)
    return type(result)(*items) if hasattr(result, "_fields") else type(result)(items)
