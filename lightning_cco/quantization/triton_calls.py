"""The kernels in ``triton_kernels.py`` for tensors on an NVIDIA GPU: whether they may be used, and how they are launched.

Triton comes with PyTorch's builds for CUDA. It compiles each kernel on first use, in about a second, and keeps it in the user's cache. Nothing here reads a
value back from the device, but the check when the kernels are used for the first time.
"""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cco.errors import CCOError
from lightning_cco.quantization.kernel_check import best_scales, some_values
from lightning_cco.quantization.kernel_library import log
from lightning_cco.quantization.layouts import around, is_dense
from lightning_cco.quantization.native import Kernels, kernels_for
from lightning_cco.quantization.pointer_checks import MOST_SIGNED, last_level
from lightning_cco.quantization.tracing import is_plain, runs_plainly

FORMATS = frozenset((torch.float32, torch.bfloat16, torch.float16))
_BYTES = 256
"""Bytes of a mask that one program writes: eight values each."""
_LONG = 512
"""Values of a channel from which on it is worth a program of its own."""
_FINENESS = 7  # as in weight_clipping.py


class TritonKernels:
    """The kernels, for dense tensors of float32, bfloat16 or float16; nothing waits for the device.

    Args:
        kernels: The module `triton_kernels`.
    """

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels
        self._int32, self._int64 = kernels.tl.int32, kernels.tl.int64

    def fake_quantize(
        self,
        x: Tensor,
        out: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        levels: tuple[int, int],
        limits: tuple[float, float],
        mask: Tensor | None,
        extrema: Tensor | None,
    ) -> None:
        """Round an activation to the grid of a scale and a zero point that are read on the device.

        Args:
            x: What to round.
            out: Where to, of the same type and strides; may be ``x``.
            scale: 0-d float32.
            zero_point: 0-d float32, integer-valued.
            levels: First and last level of the format.
            limits: Interval of an activation function applied on the way.
            mask: uint8 of ``(x.numel() + 7) // 8`` for one bit per value that has a gradient.
            extrema: float32 of 2, widened to the smallest and the largest value.
        """
        count = x.numel()
        _check_like(out, x)
        for given, dtype, size in ((scale, torch.float32, 1), (zero_point, torch.float32, 1), (extrema, torch.float32, 2)):
            _check(given, x, dtype, size)
        _check(mask, x, torch.uint8, (count + 7) // 8)
        numbers = *map(float, levels), *map(float, limits)
        flags = mask is not None, extrema is not None
        _launch(
            self._kernels.fake_quantize,
            -(-count // (8 * _BYTES)),
            x,
            (x, out, mask, extrema, scale, zero_point, count, *numbers, *flags, _BYTES),
        )

    def mask_gradient(self, grad: Tensor, out: Tensor, mask: Tensor) -> None:
        """Copy a gradient to ``out`` (which may be ``grad``) and set it to 0 where the mask's bit is 0."""
        count = grad.numel()
        _check_like(out, grad)
        _check(mask, grad, torch.uint8, (count + 7) // 8)
        _launch(self._kernels.mask_gradient, -(-count // (8 * _BYTES)), grad, (grad, out, mask, count, _BYTES))

    def fake_quantize_weight(
        self,
        weight: Tensor,
        out: Tensor,
        axis: int,
        limit: int,
        smallest_scale: float,
        scales: Tensor | None = None,
        known: bool = False,
        mse: bool = False,
    ) -> None:
        """Round a weight to the symmetric grid of each channel; for the arguments see `Kernels.fake_quantize_weight`."""
        _check_like(out, weight)
        _check(scales, weight, torch.float32, weight.shape[axis])
        outer, channels, inner = around(weight, axis)
        count = outer * inner
        # Channels in several runs, and short ones, are worked on side by side.
        rows, columns = (16, 64) if outer > 1 or count < _LONG else (1, 1024)
        position = self._int32 if count < 2**31 - columns else self._int64
        numbers = channels, inner, count, float(last_level(limit, MOST_SIGNED)), smallest_scale, float(max(1, _FINENESS // limit))
        flags = outer > 1, mse, known, scales is not None and not known
        _launch(
            self._kernels.fake_quantize_weight,
            -(-channels // rows),
            weight,
            (weight, out, scales, *numbers, *flags, rows, columns, position),
        )

    def wrong(self, device: torch.device) -> str | None:
        """Name of a function that computes something else than NumPy; `None`: all are right. Waits for the device."""
        x, scale, one = some_values(), np.float32(0.02), np.float32(1.0)

        def there(values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.from_numpy(np.asarray(values)).to(device=device, dtype=dtype)

        levels = np.rint(x * (one / scale))
        inside = (levels >= -100) & (levels <= 155) & (x > -1.5) & (x < 1.7)
        values, out, mask = there(x), there(np.zeros_like(x)), there(np.zeros((x.size + 7) // 8), torch.uint8)
        ends = there(np.zeros(2))
        self.fake_quantize(values, out, there(scale), there(np.float32(100.0)), (0, 255), (-1.5, 1.7), mask, ends)
        if not np.array_equal(out.cpu().numpy(), np.clip(levels, -75, 85) * scale):
            return "fake_quantize"
        if not np.array_equal(mask.cpu().numpy(), np.packbits(inside, bitorder="little")):
            return "fake_quantize, its mask"
        if not np.array_equal(ends.cpu().numpy(), np.clip([x.min(), x.max()], -1.5, 1.7).astype(np.float32)):
            return "fake_quantize, its extrema"
        self.mask_gradient(values, out, mask)
        if not np.array_equal(out.cpu().numpy(), np.where(inside, x, np.float32(0.0))):
            return "mask_gradient"
        block = np.ascontiguousarray(x[:960].reshape(4, 12, 20))
        weight, scales = there(block), there(np.zeros(12))
        rounded, largest = torch.empty_like(weight), np.abs(block).max(axis=(0, 2))
        for limit, mse, expected in ((127, False, largest / np.float32(127.0)), (1, True, best_scales(block))):
            steps = expected.reshape(1, 12, 1)
            self.fake_quantize_weight(weight, rounded, 1, limit, 1e-12, scales, mse=mse)
            result = np.clip(np.rint(block * (one / steps)), -limit, limit) * steps
            if not (np.array_equal(scales.cpu().numpy(), expected) and np.array_equal(rounded.cpu().numpy(), result)):
                return "fake_quantize_weight"
        return None

    def round_made_weight(self, made: Tensor, axis: int, limit: int, smallest_scale: float, mse: bool) -> None:
        """As `fake_quantize_weight`, in place, for a copy of a weight that PyTorch has just made."""
        self.fake_quantize_weight(made, made, axis, limit, smallest_scale, mse=mse)


def _launch(kernel: Any, programs: int, tensor: Tensor, arguments: tuple[Any, ...]) -> None:
    """On the tensor's device, whichever is the current one."""
    if not programs:
        return
    device = tensor.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[programs,](*arguments, enable_fp_fusion=False)
    else:
        kernel[programs,](*arguments, enable_fp_fusion=False)


def _check(tensor: Tensor | None, beside: Tensor, dtype: torch.dtype, count: int) -> None:
    if tensor is None or (tensor.dtype is dtype and tensor.numel() == count and tensor.device == beside.device and tensor.is_contiguous()):
        return
    raise CCOError(
        f"kernels: expected {count} values of {dtype} on {beside.device}, got {tensor.numel()} of {tensor.dtype}, shape {tuple(tensor.shape)}, on "
        f"{tensor.device}. Nothing was read or written; LIGHTNING_CCO_NATIVE=0 runs without kernels."
    )


def _check_like(tensor: Tensor, other: Tensor) -> None:
    if tensor is other or (
        tensor.dtype is other.dtype
        and tensor.device == other.device
        and tensor.shape == other.shape
        and (tensor.stride() == other.stride() or (tensor.is_contiguous() and other.is_contiguous()))
    ):
        return
    raise CCOError(
        f"kernels: expected two tensors of one type, shape, device and order, got {tensor.dtype} of shape {tuple(tensor.shape)} and strides "
        f"{tensor.stride()} on {tensor.device} beside {other.dtype}, {tuple(other.shape)}, {other.stride()} on {other.device}. Nothing was read or written; "
        "LIGHTNING_CCO_NATIVE=0 runs without kernels."
    )


def device_kernels_for(tensor: Tensor, device: str = "cuda") -> TritonKernels | None:
    """The kernels, if they may work on a tensor now: an ordinary one, dense, on a GPU, of a type that they know, while nobody traces or transforms.

    Args:
        tensor: The tensor.
        device: The type of device that has them. On a ``cpu`` Triton's interpreter alone runs them.
    """
    if tensor.device.type != device or tensor.dtype not in FORMATS or not runs_plainly() or not is_plain(tensor) or not is_dense(tensor):
        return None
    if tensor.device not in _loaded:
        if device == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # the check waits for the device, which a graph can't
        _loaded[tensor.device] = load(tensor.device)
    return _loaded[tensor.device]


def load(device: torch.device) -> TritonKernels | None:
    """The kernels for a device; `None`, after a line in the log that says why, if they are turned off, can't be built, or are wrong."""
    level = logging.INFO
    if os.environ.get("LIGHTNING_CCO_NATIVE", "1") == "0":
        why = "LIGHTNING_CCO_NATIVE=0"
    elif torch.version.hip is not None:
        why = "they are for NVIDIA's GPUs"
    else:
        try:
            kernels = TritonKernels(importlib.import_module("lightning_cco.quantization.triton_kernels"))  # here, since it imports Triton
            found = kernels.wrong(device)
            if found is None:
                return kernels
            why, level = f"Triton makes wrong code of '{found}'", logging.WARNING
        except ModuleNotFoundError as error:
            why = f"{error.name} is not installed"
        except Exception as error:  # whatever a missing compiler, an old driver or a full disk gives
            why, level = f"{type(error).__name__}: {str(error).strip()[:200]}", logging.WARNING
    log.log(level, "lightning_cco: kernels for the GPU are off, torch operations are used, which are slower: %s.", why)
    return None


_loaded: dict[torch.device, TritonKernels | None] = {}


def fitting_kernels(tensor: Tensor) -> Kernels | TritonKernels | None:
    """The kernels that may work on a tensor now: those in C on a CPU, those in Triton on a GPU."""
    return kernels_for(tensor) if tensor.is_cpu else device_kernels_for(tensor)
