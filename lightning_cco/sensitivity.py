"""Quantization Sensitivity: how far a layer's quantized output is from its float one.

For layer l and batch b, ``QS = sqrt(mean_b ‖q_l(x_b) − f_l(x_b)‖₂²)`` with the norm over the whole output tensor: the L2 norm between the quantized and
the float output, as the CLIKA CCO guide defines it. The raw norm grows with batch and tensor size; so there are also the relative form ``‖q − f‖ / ‖f‖``
and the signal-to-quantization-noise ratio ``10 · log10(‖f‖² / ‖q − f‖²)`` in dB.

Both are also measured for the *batch-varying* part alone: f and q − f less their means over the batch. A network tells inputs apart by what differs between
them; a large constant part of the output (a bias, a positive mean after ReLU) would hide that rounding left nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_cco.compat.metrics import syncs
from lightning_cco.number_format import badness
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.native import kernels_for
from lightning_cco.quantization.qparams import quant_range
from lightning_cco.settings import SENSITIVITY_MODES

_MOST_VALUES = 65_536


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer's sensitivity.

    Attributes:
        name: The layer.
        qs: Root mean square over the batches of the L2 norm between quantized and float output.
        relative: Norm of the difference over the norm of the float output; 0 if both are 0.
        sqnr_db: Signal-to-quantization-noise ratio in dB; infinite without a difference.
        varying_relative: ``relative`` of the batch-varying part; NaN where nothing varies (batches of one sample, constant outputs).
        varying_sqnr_db: ``sqnr_db`` of the batch-varying part; NaN likewise.
    """

    name: str
    qs: float
    relative: float
    sqnr_db: float
    varying_relative: float = math.nan
    varying_sqnr_db: float = math.nan


@dataclass(frozen=True)
class SensitivityReport:
    """The sensitivity of every measured layer, in graph order.

    Attributes:
        local: Float and quantized layer on the same float input.
        accumulated: Quantized model against float model; includes the error of all layers before.
        num_batches: Batches measured, over all processes.
    """

    local: dict[str, LayerSensitivity]
    accumulated: dict[str, LayerSensitivity]
    num_batches: int

    @property
    def main(self) -> dict[str, LayerSensitivity]:
        """The local sensitivities if they were measured, else the accumulated ones."""
        return self.local or self.accumulated

    def worst_first(self) -> list[LayerSensitivity]:
        """Layers from the most sensitive on; NaN counts as worst of all."""
        return sorted(self.main.values(), key=lambda entry: -badness(entry.qs))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        modes = {mode: [asdict(entry) for entry in getattr(self, mode).values()] for mode in SENSITIVITY_MODES}
        return {**modes, "num_batches": self.num_batches}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> SensitivityReport:
        """The report of what `to_dict` returned."""
        modes = {mode: {entry["name"]: LayerSensitivity(**entry) for entry in state[mode]} for mode in SENSITIVITY_MODES}
        return cls(modes["local"], modes["accumulated"], state["num_batches"])


def energies(quantized: Tensor, reference: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Squared norms of the difference and of the reference.

    Args:
        quantized: Any shape, any float type.
        reference: The same shape.

    Returns:
        Two numbers: Python floats where they are known without waiting for a device, else 0-d float64 tensors.

    >>> energies(torch.tensor([3.0, 2.0]), torch.tensor([3.0, 4.0]))
    (4.0, 25.0)
    """
    quantized, reference = quantized.detach(), reference.detach()
    kernels = kernels_for(reference)
    alike = quantized.dtype == reference.dtype and quantized.stride() == reference.stride() and quantized.shape == reference.shape
    if kernels is not None and alike and kernels_for(quantized) is not None:
        return kernels.energies(reference, quantized)
    quantized, reference = quantized.float(), reference.float()
    error = torch.linalg.vector_norm(quantized - reference).double().square()
    return error, torch.linalg.vector_norm(reference).double().square()


def rounding_energies(quantizer: ActivationQuantizer, reference: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Squared norms of what a quantizer's rounding changes, and of the tensor: `energies` of ``quantizer(reference)``, without memory for it.

    Args:
        quantizer: The quantizer.
        reference: What it reads, any shape.
    """
    kernels, numbers = kernels_for(reference.detach()), quantizer.numbers() if reference.is_cpu or reference.is_meta else None
    if kernels is None or numbers is None or quantizer.empty:
        return energies(quantizer(reference), reference)
    low, high = quant_range(quantizer.num_bits, quantizer.symmetric)
    return kernels.rounding_energies(reference, numbers[0], (low - numbers[1], high - numbers[1]))


def varying_energies(quantized: Tensor | ActivationQuantizer, reference: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Squared norms of what varies between the samples of a batch: of the difference and of the reference, less their means over the first axis.

    Measured on 65,536 evenly strided values at most, the same ones of each sample: what counts is their ratio.

    Args:
        quantized: The quantized output, or the quantizer that makes it of the float one.
        reference: The float output; its first axis counts samples.

    Returns:
        Two numbers as `energies` gives them; both 0 for fewer than two samples.

    >>> [float(x) for x in varying_energies(torch.tensor([[9.0], [9.0]]), torch.tensor([[8.0], [10.0]]))]
    [2.0, 2.0]
    """
    expected = reference.detach()
    if expected.dim() == 0 or expected.shape[0] < 2 or not expected.numel():
        return 0.0, 0.0
    chosen = _some_of_each_sample(expected)
    rounded = quantized(chosen) if isinstance(quantized, ActivationQuantizer) else _some_of_each_sample(quantized.detach())
    chosen = chosen.double()
    difference = rounded.double() - chosen
    error = (difference - difference.mean(0)).square().sum()
    return error, (chosen - chosen.mean(0)).square().sum()


def _some_of_each_sample(x: Tensor) -> Tensor:
    """Shape (samples, values): strided by an odd number, so that it does not stay within one channel or column."""
    flat = x.reshape(x.shape[0], -1)
    return flat[:, :: max(1, -(-flat.numel() // _MOST_VALUES)) | 1]


def summarize(
    name: str, error: float, signal: float, count: float, varying_error: float = 0.0, varying_signal: float = 0.0
) -> LayerSensitivity:
    """Sensitivity from sums over ``count`` batches of the energies."""
    nothing_varies = varying_error == varying_signal == 0.0
    varying = (math.nan, math.nan) if nothing_varies else _ratios(varying_error, varying_signal)
    return LayerSensitivity(name, math.sqrt(error / count) if error else 0.0, *_ratios(error, signal), *varying)


def _ratios(error: float, signal: float) -> tuple[float, float]:
    """Relative error and SQNR in dB of two energies."""
    if error == 0.0:
        return 0.0, math.inf
    if math.isnan(error) or math.isnan(signal):
        return math.nan, math.nan
    relative = math.sqrt(error / signal) if signal > 0.0 else math.inf
    sqnr = 10.0 * math.log10(signal / error) if signal > 0.0 and math.isfinite(signal) and math.isfinite(error) else -math.inf
    return relative, sqnr


class QuantizationSensitivity(Metric):
    """Quantization Sensitivity of one layer, as a torchmetrics metric.

    ``update(quantized, reference)`` takes one batch's outputs; ``compute()`` gives the QS, a 0-d float64 tensor.

    >>> metric = QuantizationSensitivity()
    >>> metric.update(torch.zeros(2, 2), torch.full((2, 2), 2.0))
    >>> metric.compute()
    tensor(4., dtype=torch.float64)
    """

    error: Tensor
    signal: Tensor
    count: Tensor
    varying_error: Tensor
    varying_signal: Tensor
    higher_is_better = False
    is_differentiable = False
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("error", "signal", "count", "varying_error", "varying_signal"):
            self.add_state(name, torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def update(self, quantized: Tensor, reference: Tensor) -> None:
        """Add one batch.

        Args:
            quantized: The quantized layer's output, any shape.
            reference: The float layer's output, the same shape.
        """
        error, signal = energies(quantized, reference)
        self.error += error
        self.signal += signal
        self.count += 1
        varying_error, varying_signal = varying_energies(quantized, reference)
        self.varying_error += varying_error
        self.varying_signal += varying_signal

    def compute(self) -> Tensor:
        """Root mean square of the L2 norms."""
        return (self.error / self.count.clamp(min=1)).sqrt()

    def sensitivity(self, name: str = "") -> LayerSensitivity:
        """QS, relative form and SQNR, of the whole output and of its batch-varying part, summed over processes."""
        self.compute()
        sums = float(self.error), float(self.signal), max(1.0, float(self.count)), float(self.varying_error), float(self.varying_signal)
        return summarize(name, *sums)


class LayerSensitivities(Metric):
    """Quantization Sensitivity of all layers at once: one state, one reduction.

    Args:
        names: The layers, in the order of the report.
    """

    sums: Tensor
    batches: Tensor
    full_state_update = False

    def __init__(self, names: Iterable[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = list(names)
        self._number = {name: number for number, name in enumerate(self.names)}
        # Mode, layer, and error, signal, count, varying error, varying signal.
        self.add_state(
            "sums", torch.zeros(len(SENSITIVITY_MODES), len(self.names), 5, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum"
        )
        self.add_state("batches", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def start_batch(self) -> None:
        """Count a batch."""
        self.batches += 1

    def update(self, mode: str, name: str, quantized: Tensor, reference: Tensor) -> None:
        """Add one layer's outputs on one batch.

        Args:
            mode: ``local`` or ``accumulated``.
            name: The layer.
            quantized: Its quantized output, any shape.
            reference: Its float output, the same shape.
        """
        self._add(mode, name, *energies(quantized, reference), *varying_energies(quantized, reference))

    def update_rounding(self, mode: str, name: str, quantizer: ActivationQuantizer, reference: Tensor) -> None:
        """Add one layer's output on one batch, and what a quantizer would make of it: ``update`` without memory for that."""
        self._add(mode, name, *rounding_energies(quantizer, reference), *varying_energies(quantizer, reference))

    def _add(self, mode: str, name: str, error: float | Tensor, signal: float | Tensor, *varying: float | Tensor) -> None:
        if name not in self._number:
            return
        entry = self.sums[SENSITIVITY_MODES.index(mode), self._number[name]]
        values = [torch.as_tensor(value, dtype=entry.dtype, device=entry.device) for value in (error, signal, 1.0, *varying)]
        entry += torch.stack(values)

    def compute(self) -> Tensor:
        """QS of each mode and layer, of shape (2, layers), float64."""
        return (self.sums[..., 0] / self.sums[..., 2].clamp(min=1)).sqrt()

    def report(self, modes: Sequence[str]) -> SensitivityReport:
        """The report, summed over processes. A layer that never ran is left out."""
        with self.sync_context(should_sync=syncs(self) and torch.distributed.is_available() and torch.distributed.is_initialized()):
            sums, batches = self.sums.cpu().tolist(), int(self.batches)
        found = {
            mode: {name: summarize(name, *row) for name, row in zip(self.names, sums[number], strict=True) if row[2] > 0}
            for number, mode in enumerate(SENSITIVITY_MODES)
            if mode in modes
        }
        return SensitivityReport(found.get("local", {}), found.get("accumulated", {}), batches)
