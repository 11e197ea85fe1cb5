"""Before and after the batches of a calibration: which quantizers observe, whether the weights are finite, what came of it."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.ops import operation_of_kind
from lightning_cco.names import list_names
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.plan import QuantizationPlan
from lightning_cco.quantization.range_updates import sync_calibration
from lightning_cco.quantization.tensor_key import TensorKey

_NARROW = 64
_ENOUGH = 3
"""Batches of which one can be called unusual."""
_OUTLYING = 16
"""How many times as wide as a usual batch a range may be: of 8 bits that leaves 16 levels to the usual ones."""


def check_weights(model: nn.Module, graph: LayerGraph) -> None:
    """Look at all parameters and running statistics of layers, also of those in float: what they make out of them is calibrated all the same.

    Raises:
        CCOError: One holds NaN or infinite values; the message names it and its layer.
    """
    _check_statistics(model, graph)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    finite: dict[str, bool] = {}
    for layer in graph:
        for name in layer.parameters:
            tensor = parameters.get(name)
            if tensor is None or not tensor.is_floating_point():
                continue
            if name not in finite:
                finite[name] = not bool(_diverged(tensor.detach(), layer.kind).any())
            if not finite[name]:
                raise CCOError(
                    f"calibrate: the parameter '{name}' of layer '{layer.name}' holds NaN or infinite values: expected finite ones. "
                    "Load a checkpoint from before the training diverged."
                )


def _check_statistics(model: nn.Module, graph: LayerGraph) -> None:
    """Look at the running statistics of norms: a single batch of infinite values, or that is not a number, stays in them for good."""
    modules = dict(model.named_modules())
    for layer in graph:
        if layer.kind not in ("batch_norm", "instance_norm") or layer.path not in modules:
            continue
        for name, buffer in modules[layer.path].named_buffers(recurse=False):
            if name not in ("running_mean", "running_var"):
                continue
            finite = bool(buffer.isfinite().all())
            if finite and (name != "running_var" or bool((buffer >= 0).all())):
                continue
            holds = "holds negative values; variances were" if finite else "holds NaN or infinite values; finite ones were"
            where = f"{layer.path}.{name}".lstrip(".")
            raise CCOError(
                f"calibrate: the buffer '{where}' of layer '{layer.name}' {holds} expected. Load a checkpoint from before the training diverged, or call "
                "reset_running_stats() on that module and train on."
            )


def _broken_buffers(model: nn.Module) -> str:
    """Names the buffers that hold what is not a number, in a sentence; infinite values may well be those of a mask."""
    found = [name for name, buffer in model.named_buffers() if buffer.is_floating_point() and bool(buffer.isnan().any())]
    return f" NaN is in the buffers of the model {list_names(found)}." if found else ""


def _diverged(values: Tensor, kind: str) -> Tensor:
    """Which values of a parameter nobody meant. A mask that fills may well be infinite, one that is added -∞; a factor is neither."""
    if kind == "mul" or not operation_of_kind(kind).masks:
        return ~values.isfinite()
    return values.isnan() | (values == math.inf) if kind == "add" else values.isnan()


def chosen_quantizers(
    activations: Mapping[TensorKey, ActivationQuantizer], only: Iterable[str] | None
) -> dict[TensorKey, ActivationQuantizer]:
    """The quantizers of some names, or all of them.

    Raises:
        CCOError: There is none of such a name.
    """
    chosen: set[str] = set(activations) if only is None else set(only)
    found = {key: quantizer for key, quantizer in activations.items() if key in chosen}
    if unknown := chosen.difference(found):
        raise CCOError(f"calibrate: expected names of quantizers, such as {list(activations)[:3]}, got {sorted(unknown)}.")
    return found


def finish_calibration(model: nn.Module, graph: LayerGraph, observed: Mapping[TensorKey, ActivationQuantizer], batches: int) -> None:
    """Set the ranges from what the quantizers observed; under DDP equally on all ranks.

    Args:
        model: The model, for messages.
        graph: Its layers, likewise.
        observed: The calibrated quantizers by tensor.
        batches: How many batches they saw.

    Raises:
        CCOError: There was no batch, or a layer gave NaN or infinite values; the message names it.
    """
    if not batches:
        raise CCOError(
            "calibrate: no batch came, so no range is known. Expected at least one batch of what the model's forward takes; "
            "check that the loader is not empty and that stats_steps is at least 1."
        )
    errors = sync_calibration(list(observed.values()))
    for number, (key, quantizer) in enumerate(observed.items()):
        if quantizer.finish_calibration(errors[number] if errors is not None else None) == "non_finite":
            layer = graph[key.layer]
            where = f"module '{layer.path}', {layer.kind}" if layer.path else layer.kind
            raise CCOError(
                f"calibrate: layer '{layer.name}' ({where}) gave NaN or infinite values: expected finite ones.{_broken_buffers(model)} "
                "Check the float model on the same batch (learning rate, input scaling, loss of precision in float16) before quantizing, "
                f"or skip the layer: {{match: {layer.name}, skip_quantization: true}}."
            )
    _warn_of_narrow_slices(graph, observed)
    _warn_of_outlying_batches(observed)


def warn_of_zeros(plan: QuantizationPlan, observed: Mapping[TensorKey, ActivationQuantizer]) -> None:
    """Say which ranges are [0, 0]: until they move, what passes there is not rounded."""
    zero, absent = (
        list(dict.fromkeys(key.layer for key, q in observed.items() if q.empty and q.saw_zeros is saw_zeros)) for saw_zeros in (True, False)
    )
    zero, absent = ([name for name in names if _makes_int8(plan, name)] for names in (zero, absent))
    what = [
        *([f"nothing but zeros came out of {list_names(zero)}"] if zero else []),
        *([f"nothing came out of {list_names(absent)} (a branch that no batch took, no rows)"] if absent else []),
    ]
    if what:
        warnings.warn(
            f"calibrate: {' and '.join(what)}, so the range there is [0, 0] and values pass unrounded. It takes the first values that come in training, "
            "unless ranges are frozen. If the zeros are not meant, check the batches (scaling, masks, dead units) or raise training_settings.stats_steps; "
            f"if they are, the layer is better skipped: {{match: {[*zero, *absent][0]}, skip_quantization: true}}.",
            CCOWarning,
            stacklevel=3,
        )


def _warn_of_narrow_slices(graph: LayerGraph, observed: Mapping[TensorKey, ActivationQuantizer]) -> None:
    """Name the layers that read a slice of a tensor whose other slices are so much wider that of 8 bits at most two are left to theirs."""
    for key, quantizer in observed.items():
        widths, quantizer.widths = {read: float(width) for read, width in quantizer.widths.items()}, {}
        widest = max([*widths.values(), float(quantizer.max_val - quantizer.min_val)])
        narrow = {read: width for read, width in widths.items() if 0.0 < width * _NARROW < widest < math.inf}
        if narrow:
            (layer, number), width = min(narrow.items(), key=lambda item: item[1])
            readers = [edge.destination for edge in graph.edges if (edge.source, edge.source_output) == (layer, number)]
            skipped = layer if graph[layer].weighted or not readers else readers[0]
            names = list_names(list(dict.fromkeys(name for name, _ in narrow)))
            warnings.warn(
                f"calibrate: {names} read slices of '{key.layer}' with values less than 1/{_NARROW} as large as those of its other slices "
                f"('{layer}': {width:.3g} of {widest:.3g}). All of them are rounded with one scale, so little or nothing is left of the small ones, and what "
                "reads them learns nothing. Bring the columns of the input to one scale (normalize them), give the slices to the model as inputs of their "
                f"own, or skip the layer that reads them: {{match: {skipped}, skip_quantization: true}}.",
                CCOWarning,
                stacklevel=4,
            )


def _warn_of_outlying_batches(observed: Mapping[TensorKey, ActivationQuantizer]) -> None:
    """Name the tensors whose range one batch, or a few, have made so wide that hardly a level is left to most others."""
    wide: list[tuple[TensorKey, float, float, int]] = []
    for key, quantizer in observed.items():
        widths, quantizer.batch_widths = [float(width) for width in quantizer.batch_widths], []
        if len(widths) < _ENOUGH:
            continue
        usual, width = statistics.median(widths), float(quantizer.max_val.clamp(min=0.0) - quantizer.min_val.clamp(max=0.0))
        if 0.0 < usual * _OUTLYING < width:
            wide.append((key, width, usual, widths.index(max(widths)) + 1))
    if not wide:
        return
    key, width, usual, number = wide[0]
    levels = (1 << observed[key].num_bits) - 1
    names, left = list_names(list(dict.fromkeys(key.layer for key, *_ in wide))), max(1, round(usual / width * levels))
    warnings.warn(
        f"calibrate: batch {number} has made the range of {names} more than {_OUTLYING} times as wide as the values of half of the batches are "
        f"('{key.layer}': {width:.3g}, {usual:.3g}), so those keep {left} of {levels} levels. Look at the samples of that batch (scaling, a broken file) and "
        "leave them out. If batches differ so much by nature, bring them to one scale, or skip the layer: "
        f"{{match: {key.layer}, skip_quantization: true}}.",
        CCOWarning,
        stacklevel=4,
    )


def _makes_int8(plan: QuantizationPlan, name: str) -> bool:
    """Whether an INT8 layer makes or reads a layer's output."""
    return name in plan.quantized or any(reader in plan.quantized for reader in plan.graph.successors(name))
