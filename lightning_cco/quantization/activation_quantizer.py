"""The quantizer of an activation: fake-quantizes with the range that it holds."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_cco.quantization.activation_range import ActivationRange
from lightning_cco.quantization.fake_quantize import fake_quantize, fake_quantize_small, widen
from lightning_cco.quantization.native import Kernels, ReadyGrid
from lightning_cco.quantization.qparams import NO_LIMITS, quant_range
from lightning_cco.quantization.ranges import percentile_range
from lightning_cco.quantization.small_tensors import has_small_gradient
from lightning_cco.quantization.tracing import behind_transforms


def _number(tensor: Tensor) -> float:
    """The one value of a float32 tensor on the CPU, read without an operation."""
    return float(ctypes.c_float.from_address(tensor.data_ptr()).value)


class ActivationQuantizer(ActivationRange):
    """Fake-quantizes one activation tensor with one scale and zero point; see `ActivationRange` for arguments and attributes."""

    def __init__(
        self,
        num_bits: int = 8,
        symmetric: bool = False,
        estimator: str = "moving_average",
        averaging_constant: float = 0.05,
        percentile: float = 99.99,
    ) -> None:
        super().__init__(num_bits, symmetric, estimator, averaging_constant, percentile)
        # Versions of scale and zero point, and both as Python numbers; one attribute, since threads share it: operations with tensors of one
        # number are up to four times slower on a CPU.
        self._numbers: tuple[tuple[int, int], tuple[float, float]] = ((-1, -1), (1.0, 0.0))
        # The grid for small tensors, and what it was made of.
        self._ready: tuple[tuple[float, float], tuple[float, float] | None, torch.dtype, ReadyGrid] | None = None

    @torch.no_grad()
    def _watch(self, x: Tensor, clamp: tuple[float, float] | None) -> None:
        # Nothing wraps what a compiler traces.
        with nullcontext(x.detach()) if torch.compiler.is_compiling() else behind_transforms(x) as values:
            if values is not None:
                low, high = percentile_range(values, self.percentile, clamp)
                self.extrema.copy_(torch.stack([torch.minimum(self.extrema[0], low), torch.maximum(self.extrema[1], high)]))

    def forward(
        self, x: Tensor, clamp: tuple[float, float] | None = None, inplace: bool = False, track: bool = False, shared: bool = False
    ) -> Tensor:
        """Fake-quantize.

        Args:
            x: The activation, any shape, any float type.
            clamp: An activation function to apply on the way, as an interval.
            inplace: Overwrite ``x``.
            track: Whether the range is to follow this batch, unless it is frozen.
            shared: Whether others hold ``x``, who may overwrite it before the backward.
        """
        buffers = self._buffers  # read directly: a module's attributes take a microsecond each
        extrema = buffers["extrema"] if track and not (self.frozen or self.settled) else None
        if extrema is not None and self.estimator == "percentile":
            self._watch(x, clamp)
            extrema = None
        if self.empty:
            if extrema is not None:
                widen(extrema, x.detach(), clamp)
            return x if clamp is None else F.hardtanh(x, *clamp, inplace=inplace)
        scale, zero_point = buffers["scale"], buffers["zero_point"]
        assert scale is not None
        assert zero_point is not None
        numbers = None
        if not torch.compiler.is_compiling() and (x.is_cpu or x.is_meta) and scale.is_cpu:
            numbers = self._read(scale, zero_point)
            if not shared and has_small_gradient(x):  # which keeps its input for the backward
                rounded = fake_quantize_small(x, self._grid, clamp, inplace, extrema)
                if rounded is not None:
                    return rounded
        return fake_quantize(x, scale, zero_point, self.num_bits, self.symmetric, clamp, inplace, numbers, extrema)

    def _grid(self, kernels: Kernels, clamp: tuple[float, float] | None, dtype: torch.dtype) -> ReadyGrid:
        numbers, known = self._numbers[1], self._ready
        if known is not None and known[0] is numbers and known[1] == clamp and known[2] is dtype:
            return known[3]
        ready = kernels.ready(numbers, quant_range(self.num_bits, self.symmetric), NO_LIMITS if clamp is None else clamp, dtype)
        object.__setattr__(self, "_ready", (numbers, clamp, dtype, ready))  # at once: other threads use it as well
        return ready

    def numbers(self) -> tuple[float, float] | None:
        """Scale and zero point as Python numbers, where reading them makes neither a compiler nor a device stop: eagerly and on the CPU."""
        return self._read(self.scale, self.zero_point) if not torch.compiler.is_compiling() and self.scale.is_cpu else None

    def note_numbers(self, scale: float, zero_point: float) -> None:
        """Keep what was just written to scale and zero point."""
        buffers = self._buffers
        versions = buffers["scale"]._version, buffers["zero_point"]._version  # type: ignore[union-attr]
        object.__setattr__(self, "_numbers", (versions, (scale, zero_point)))  # past `nn.Module`, whose attributes take ten times as long

    def _read(self, scale: Tensor, zero_point: Tensor) -> tuple[float, float]:
        versions = scale._version, zero_point._version
        known, values = self._numbers
        if known != versions:
            # From memory, since somebody may be tracing. If another thread moves the range meanwhile, the versions tell so the next time.
            values = _number(scale), _number(zero_point)
            object.__setattr__(self, "_numbers", (versions, values))
        return values
