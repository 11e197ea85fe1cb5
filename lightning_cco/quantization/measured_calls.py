"""A planned call that is looked at instead of only quantized: observed, measured, recorded, one function for each phase.

Each takes what the phase needs first, then the frame, the quantizers, the function, arguments and keyword arguments of the call, and gives its result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_cco.compat.torch_modes import is_functorch_wrapped
from lightning_cco.graph.call_node import ModuleCall
from lightning_cco.quantization.call_arguments import at, renormalized, replaced
from lightning_cco.quantization.rounded_calls import results_of, with_dynamic
from lightning_cco.quantization.sites import SiteQuantizers
from lightning_cco.quantization.tracing import behind_transforms

OutputRecorder = Callable[..., Any]
"""Called with a layer's name, its quantized output (or the quantizer that would make it of the float one), and its float output; in `Phase.DELEGATE` with
the quantizers of a call, its function, arguments and keyword arguments, for its result."""


def observe(
    batch: Callable[[], int],
    only: frozenset[int] | None,
    _: ModuleCall,
    site: SiteQuantizers,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Float forward; the quantizers look at what passes.

    Args:
        batch: Gives the number of the calibration batch.
        only: Identities of the quantizers that observe; `None`: all.
        site: The call's quantizers.
        func: Its function.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    for slot, _source, quantizer in site.reads:
        if only is None or id(quantizer) in only:
            quantizer.observe(at(args, kwargs, slot), batch())
    for slot, weight_quantizer in site.weights:
        weight_quantizer.see(at(args, kwargs, slot))
    result = func(*args, **kwargs)
    for slot, _source, quantizer in site.reads:
        if only is None or id(quantizer) in only:
            quantizer.see_read(site.layer, results_of(result, args) if site.passes else [at(args, kwargs, slot)])
    for position, quantizer in site.outputs:
        if only is None or id(quantizer) in only:
            quantizer.observe(results_of(result, args)[position], batch())
    return result


def measure_local(
    record: OutputRecorder, _: ModuleCall, site: SiteQuantizers, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Float and quantized layer on the same float input; the float result flows on."""
    if site.renormalizes:
        args, kwargs = renormalized(args, kwargs)
    for slot, source, quantizer in site.reads:
        if source:
            _give(record, source, quantizer, at(args, kwargs, slot))
    if not site.weights and [position for position, _ in site.outputs] == [0]:
        result = func(*args, **kwargs)
        _give(record, site.layer, site.outputs[0][1], results_of(result, args)[0])
        return result
    quantized = None
    if site.weights:
        weighted_args, weighted_kwargs = args, kwargs
        for slot, weight_quantizer in site.weights:
            weighted_args, weighted_kwargs = replaced(weighted_args, weighted_kwargs, slot, weight_quantizer)
        weighted_args, weighted_kwargs = with_dynamic(site, weighted_args, weighted_kwargs)
        if site.in_place:
            weighted_args = (weighted_args[0].clone(), *weighted_args[1:])
        if site.correction is not None:
            weighted_args, weighted_kwargs = site.correction.applied(weighted_args, weighted_kwargs)
        quantized = results_of(func(*weighted_args, **weighted_kwargs), weighted_args)
    result = func(*args, **kwargs)
    reference = results_of(result, args)
    quantized = quantized if quantized is not None else list(reference)
    for position, quantizer in site.outputs:
        quantized[position] = quantizer(quantized[position])
    _give(record, site.layer, quantized[0], reference[0])
    return result


def _give(record: OutputRecorder, name: str, quantized: Any, reference: Any) -> None:
    """Give a recorder what passes; under `torch.func` the samples of all calls at once, since what is kept of them outlives the transform."""
    if not isinstance(reference, Tensor) or not is_functorch_wrapped(reference):
        record(name, quantized, reference)
        return
    with behind_transforms(reference) as whole:
        if whole is None:
            return
        if not isinstance(quantized, Tensor):
            record(name, quantized, whole)
            return
        with behind_transforms(quantized) as rounded:
            if rounded is not None:
                record(name, rounded, whole)


def record_float(
    record: OutputRecorder, _: ModuleCall, site: SiteQuantizers, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Float forward; the recorder gets each planned layer's float output."""
    return _recorded(record, site, args, kwargs, lambda _, value: value, lambda: func(*args, **kwargs))


def record_quantized(
    record: OutputRecorder,
    quantize: Callable[..., Any],
    frame: ModuleCall,
    site: SiteQuantizers,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Quantized forward; the recorder gets each planned layer's quantized output."""
    return _recorded(
        record, site, args, kwargs, lambda quantizer, value: quantizer(value), lambda: quantize(frame, site, func, args, kwargs)
    )


def _recorded(
    record: OutputRecorder,
    site: SiteQuantizers,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    as_read: Callable[[Any, Any], Any],
    call: Callable[[], Any],
) -> Any:
    """Make a call, and give the recorder what it reads of sources that only it rounds, and its output."""
    for slot, source, quantizer in site.reads:
        if source:
            value = at(args, kwargs, slot)
            _give(record, source, as_read(quantizer, value), value)
    result = call()
    output = results_of(result, args)[0]
    _give(record, site.layer, output, output)
    return result


def correct(
    recorder: OutputRecorder,
    quantize: Callable[..., Any],
    frame: ModuleCall,
    site: SiteQuantizers,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Quantized forward, in which the recorder moves the result of a layer before it is rounded."""
    return quantize(frame, site, recorder(site.layer, func), args, kwargs)


def delegate(
    recorder: OutputRecorder, _: ModuleCall, site: SiteQuantizers, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The recorder makes the call."""
    return recorder(site, func, args, kwargs)
