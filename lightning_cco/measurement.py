"""The pass that measures the Quantization Sensitivity of every layer: two forwards and a repetition of the layers with weights."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_cco.errors import CCOWarning
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.forward_call import Forward
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.phases import Phase
from lightning_cco.sensitivity import LayerSensitivities, SensitivityReport


def measure(quantized: HookedModel, batches: Iterable[Any], forward: Forward, modes: Sequence[str]) -> SensitivityReport:
    """Measure the Quantization Sensitivity of each layer.

    Args:
        quantized: A calibrated model.
        batches: The held batches, on the model's device.
        forward: How a batch goes through the model.
        modes: ``local``, ``accumulated`` or both.
    """
    with torch.device("cpu"):  # torchmetrics makes tensors of its own on the default device, which is the user's
        metric = LayerSensitivities(quantized.measured_layers()).to(quantized.device)
    differing: list[str] = []
    with quantized.evaluating():
        for batch in batches:
            metric.start_batch()
            differing += _measure_batch(quantized, metric, lambda batch=batch: forward(quantized.model, batch), modes)  # type: ignore[misc]
    _warn_of_selections(differing)
    return metric.report(modes)


def _warn_of_selections(names: Sequence[str]) -> None:
    if names:
        warnings.warn(
            f"Accumulated QS: layer '{names[0]}' computes what the model selects by value (proposals, tokens, experts), and rounding changes how much that is. "
            "Where a batch gives it, or a layer after it, another shape than in float, the batch is left out of that layer's accumulated QS.",
            CCOWarning,
            stacklevel=3,
        )


def _measure_batch(quantized: HookedModel, metric: LayerSensitivities, forward: Callable[[], Any], modes: Sequence[str]) -> list[str]:
    """Add one batch; returns the layers whose outputs have another shape with rounding than without."""
    # A list for each layer: a step may call a module more than once (a discriminator on real and fake), one set of layers with two outputs.
    reference: dict[str, deque[Tensor]] = {}
    differing: list[str] = []

    def keep(name: str, output: Tensor) -> None:
        overwritten = quantized.capture.sites[name].overwritten
        reference.setdefault(name, deque()).append(output.clone() if overwritten else output)

    def compare_local(name: str, rounded: Tensor | ActivationQuantizer, expected: Tensor) -> None:
        if isinstance(rounded, Tensor):
            metric.update("local", name, rounded, expected)
        else:
            metric.update_rounding("local", name, rounded, expected)
        if "accumulated" in modes:  # the layers around run in float: the same reference
            keep(name, expected)

    def keep_float(name: str, _: Tensor | ActivationQuantizer, output: Tensor) -> None:
        keep(name, output)

    def compare(name: str, output: Tensor | ActivationQuantizer, _: Tensor) -> None:
        assert isinstance(output, Tensor)
        if not reference.get(name):  # rounding made the model take another path
            return
        expected = reference[name].popleft()
        if output.shape == expected.shape:
            metric.update("accumulated", name, output, expected)
        else:
            differing.append(name)

    first = (Phase.MEASURE_LOCAL, compare_local) if "local" in modes else (Phase.RECORD_FLOAT, keep_float)
    for what, recorder in (first, (Phase.RECORD_QUANTIZED, compare)) if "accumulated" in modes else (first,):
        # What a step draws (a generator's noise) must be the same in each forward.
        with quantized.forked_random(), quantized.runtime.doing(what, recorder):
            forward()
    return differing
