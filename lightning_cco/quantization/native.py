"""The kernels in ``kernels.c``: compiled on first use, kept in the user's cache, called through ctypes. Without a C compiler there are none.

PyTorch runs fake-quantization as four operations, each of which passes over the memory; one pass costs a quarter. The compiler is the system's own (``CC``,
else ``cc``, ``gcc`` or ``clang``), and takes under a second once per machine. ``LIGHTNING_CCO_NATIVE=0`` turns the kernels off,
``LIGHTNING_CCO_CFLAGS`` holds further flags for the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_cco.errors import CCOError
from lightning_cco.quantization.kernel_check import best_scales, some_values
from lightning_cco.quantization.kernel_library import log, open_library
from lightning_cco.quantization.layouts import around, is_dense
from lightning_cco.quantization.tracing import is_plain, runs_plainly

FORMATS = {torch.float32: 0, torch.bfloat16: 1}
_INF = float("inf")
_GRAIN = 1 << 15  # values that are not worth a second thread, as in C

_float, _int, _long, _pointer = ctypes.c_float, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class ReadyGrid(NamedTuple):
    """A grid as C reads it.

    Attributes:
        numbers: Scale, first and last level, ends of the format, limits of the activation; seven float32.
        low: The largest value below all that have a gradient.
        high: The smallest above them.
    """

    numbers: bytes
    low: float
    high: float


class Kernels:
    """The compiled functions, for dense CPU tensors of float32 or bfloat16.

    Every pointer is checked before C gets it (`_address`): a tensor of another type, size or device is an error, never a write past its end.

    Args:
        library: The loaded library.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._around: dict[tuple[torch.Size, tuple[int, ...], int], tuple[int, int, int]] = {}
        self._fake_quantize = library.fake_quantize
        self._fake_quantize.argtypes = [_pointer, _pointer, _long, _int, *[_float] * 7, _pointer, _pointer, _int]
        self._fake_quantize.restype = _long
        self._round_to_grid = library.round_to_grid
        self._round_to_grid.argtypes = [_pointer, _pointer, _long, _int, ctypes.c_char_p, _pointer, _int]
        self._round_to_grid.restype = _long
        self._gradient_ends = library.gradient_ends
        self._gradient_ends.argtypes = [ctypes.c_char_p, _int, _pointer]
        self._gradient_ends.restype = None
        self._widen = library.widen
        self._widen.argtypes = [_pointer, _long, _int, _float, _float, _pointer, _int]
        self._widen.restype = None
        self._mask_gradient = library.mask_gradient
        self._mask_gradient.argtypes = [_pointer, _pointer, _pointer, _long, _int, _int]
        self._mask_gradient.restype = None
        self._fake_quantize_weight = library.fake_quantize_weight
        self._fake_quantize_weight.argtypes = [_pointer, _pointer, *[_long] * 3, _int, _float, _float, _int, _pointer, _int, _int]
        self._fake_quantize_weight.restype = None
        self._weight_scale = library.weight_scale
        self._weight_scale.argtypes = [_pointer, *[_long] * 3, _int, _float, _float, _int, _pointer, _int]
        self._weight_scale.restype = None
        self._energies = library.energies
        self._energies.argtypes = [_pointer, _pointer, _long, _int, *[_float] * 3, _pointer, _int]
        self._energies.restype = None

    def fake_quantize(
        self,
        x: Tensor,
        out: Tensor,
        scale: float,
        levels: tuple[float, float],
        ends: tuple[float, float],
        limits: tuple[float, float],
        mask: Tensor | None,
        extrema: Tensor | None,
    ) -> int:
        """Round to the grid.

        Args:
            x: What to round.
            out: Where to, of the same type and strides; may be ``x``.
            scale: Step of the grid.
            levels: First and last level that are used.
            ends: First and last level of the format: beyond them there is no gradient.
            limits: Interval of an activation function applied on the way: beyond it there is no gradient either.
            mask: uint8 of ``(x.numel() + 7) // 8`` for one bit per value that has a gradient.
            extrema: float32 of 2, widened to the smallest and the largest value.

        Returns:
            How many values have no gradient; without a mask, how many are NaN.
        """
        count, dtype = x.numel(), x.dtype
        address = _address(x, dtype, count)
        blocked: int = self._fake_quantize(
            address,
            address if out is x else _address_like(out, x),
            count,
            FORMATS[dtype],
            scale,
            *levels,
            *ends,
            *limits,
            None if mask is None else _address(mask, torch.uint8, (count + 7) // 8),
            None if extrema is None else _address(extrema, torch.float32, 2),
            torch.get_num_threads(),
        )
        return blocked

    def ready(
        self, scale: float, levels: tuple[float, float], ends: tuple[float, float], limits: tuple[float, float], dtype: torch.dtype
    ) -> ReadyGrid:
        """A grid, described as for `fake_quantize`, for `round_made`."""
        numbers, found = struct.pack("7f", scale, *levels, *ends, *limits), (_float * 2)()
        self._gradient_ends(numbers, FORMATS[dtype], found)
        return ReadyGrid(numbers, found[0], found[1])

    def round_made(self, x: Tensor, made: Tensor, grid: ReadyGrid, extrema: Tensor | None) -> bool:
        """Round into what an operation of PyTorch has just made of ``x``, value by value.

        It has read all of ``x``, and nobody has seen its result yet, so there are no addresses to be checked.

        Args:
            x: What to round, dense.
            made: Where to.
            grid: The grid.
            extrema: As for `fake_quantize`.

        Returns:
            Whether all went well: not if there is a NaN, or the result lies otherwise in memory.
        """
        count = x.numel()
        if not x.is_contiguous() and made.stride() != x.stride():
            return False
        broken: int = self._round_to_grid(
            x.data_ptr(),
            made.data_ptr(),
            count,
            FORMATS[x.dtype],
            grid.numbers,
            None if extrema is None else _address(extrema, torch.float32, 2),
            torch.get_num_threads() if count > _GRAIN else 1,
        )
        return not broken

    def widen(self, x: Tensor, limits: tuple[float, float], extrema: Tensor) -> None:
        """Widen ``extrema``, float32 of 2, to the smallest and the largest value of ``x`` after a clamp to the limits."""
        count = x.numel()
        ends = _address(extrema, torch.float32, 2)
        self._widen(_address(x, x.dtype, count), count, FORMATS[x.dtype], *limits, ends, torch.get_num_threads())

    def mask_gradient(self, grad: Tensor, out: Tensor, mask: Tensor) -> None:
        """Copy a gradient to ``out`` (which may be ``grad``) and set it to 0 where the mask's bit is 0."""
        count, dtype = grad.numel(), grad.dtype
        bits, address = _address(mask, torch.uint8, (count + 7) // 8), _address(grad, dtype, count)
        target = address if out is grad else _address_like(out, grad)
        self._mask_gradient(address, target, bits, count, FORMATS[dtype], torch.get_num_threads())

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
        """Round a dense weight to the symmetric grid of each channel.

        Args:
            weight: Any shape.
            out: The same shape, type and strides.
            axis: Axis of the channels.
            limit: Largest level, at most 127.
            smallest_scale: Least scale.
            scales: float32 with one value for each channel, written unless they are known.
            known: Whether to take the scales as they are instead of computing them.
            mse: Whether the scales are those at which rounding and clipping lose least, instead of those of the largest magnitudes.
        """
        self._fake_quantize_weight(
            _address(weight, weight.dtype, weight.numel()),
            _address_like(out, weight),
            *around(weight, axis),
            FORMATS[weight.dtype],
            within_int8(limit),
            smallest_scale,
            mse,
            None if scales is None else _address(scales, torch.float32, weight.shape[axis]),
            known,
            torch.get_num_threads(),
        )

    def round_made_weight(self, made: Tensor, axis: int, limit: int, smallest_scale: float, mse: bool) -> None:
        """As `fake_quantize_weight`, in place, for a copy of a weight that PyTorch has just made, whose address need not be checked."""
        key = made.shape, made.stride(), axis
        counts = self._around.get(key)
        if counts is None:
            counts = self._around[key] = around(made, axis)
        outer, channels, inner = counts
        address, count = made.data_ptr(), outer * channels * inner
        threads = torch.get_num_threads() if count > _GRAIN else 1
        form = FORMATS[made.dtype]
        self._fake_quantize_weight(
            address, address, outer, channels, inner, form, within_int8(limit), smallest_scale, mse, None, False, threads
        )

    def weight_scale(self, weight: Tensor, axis: int, limit: int, smallest_scale: float, scales: Tensor, mse: bool = False) -> None:
        """The scales that `fake_quantize_weight` takes, float32 with one value for each channel."""
        self._weight_scale(
            _address(weight, weight.dtype, weight.numel()),
            *around(weight, axis),
            FORMATS[weight.dtype],
            within_int8(limit),
            smallest_scale,
            mse,
            _address(scales, torch.float32, weight.shape[axis]),
            torch.get_num_threads(),
        )

    def energies(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Squared norms of ``y - x`` and of ``x``, two tensors of the same type and strides."""
        sums = (ctypes.c_double * 2)()
        count = x.numel()
        self._energies(
            _address(x, x.dtype, count), _address_like(y, x), count, FORMATS[x.dtype], 0.0, 0.0, 0.0, sums, torch.get_num_threads()
        )
        return sums[0], sums[1]

    def rounding_energies(self, x: Tensor, scale: float, levels: tuple[float, float]) -> tuple[float, float]:
        """Squared norms of what rounding to a grid changes, and of ``x``."""
        sums = (ctypes.c_double * 2)()
        count = x.numel()
        self._energies(_address(x, x.dtype, count), None, count, FORMATS[x.dtype], scale, *levels, sums, torch.get_num_threads())
        return sums[0], sums[1]

    def wrong(self) -> str | None:
        """Name of a function that computes something else than NumPy, which no mode or default of PyTorch disturbs; `None`: all are right."""
        x, scale = some_values(), np.float32(0.02)
        levels = np.rint(x * (np.float32(1.0) / scale))
        inside = (levels >= -100) & (levels <= 90) & (x > -1.5) & (x < 1.7)
        y, mask, ends = np.empty_like(x), np.zeros((x.size + 7) // 8, np.uint8), np.array([0.0, 0.0], np.float32)
        levels_and_limits = (-90.0, 80.0, -100.0, 90.0, -1.5, 1.7)
        blocked = self._fake_quantize(
            x.ctypes.data, y.ctypes.data, x.size, 0, scale, *levels_and_limits, mask.ctypes.data, ends.ctypes.data, 1
        )
        expected = np.clip(levels, -90, 80) * scale
        if not (
            np.array_equal(y, expected) and blocked == int((~inside).sum()) and np.array_equal(mask, np.packbits(inside, bitorder="little"))
        ):
            return "fake_quantize"
        if not np.array_equal(ends, np.clip([x.min(), x.max()], -1.5, 1.7).astype(np.float32)):
            return "widen"
        self._mask_gradient(x.ctypes.data, y.ctypes.data, mask.ctypes.data, x.size, 0, 1)
        if not np.array_equal(y, np.where(inside, x, np.float32(0.0))):
            return "mask_gradient"
        grid, passing = struct.pack("7f", scale, *levels_and_limits), (_float * 2)()
        self._round_to_grid(x.ctypes.data, y.ctypes.data, x.size, 0, grid, None, 1)
        self._gradient_ends(grid, 0, passing)
        if not (np.array_equal(y, expected) and np.array_equal(inside, (x > passing[0]) & (x < passing[1]))):
            return "round_to_grid"
        half, rounded = (x.view(np.uint32) >> 16).astype(np.uint16), np.empty(x.size, np.uint16)
        self._fake_quantize(half.ctypes.data, rounded.ctypes.data, x.size, 1, scale, *levels_and_limits, None, None, 1)
        bits = np.clip(np.rint((half.astype(np.uint32) << 16).view(np.float32) * (np.float32(1.0) / scale)), -90, 80) * scale
        bits = bits.astype(np.float32).view(np.uint32)
        if not np.array_equal(rounded, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)):
            return "fake_quantize of bfloat16"
        weight = np.ascontiguousarray(x[:960].reshape(4, 12, 20))
        scales, found, result = np.abs(weight).max(axis=(0, 2)) / np.float32(127.0), np.empty(12, np.float32), np.empty_like(weight)
        self._weight_scale(weight.ctypes.data, 4, 12, 20, 0, 127.0, 1e-12, False, found.ctypes.data, 1)
        self._fake_quantize_weight(weight.ctypes.data, result.ctypes.data, 4, 12, 20, 0, 127.0, 1e-12, False, None, False, 1)
        wide = scales.reshape(1, 12, 1)
        if not (np.array_equal(found, scales) and np.array_equal(result, np.rint(weight * (np.float32(1.0) / wide)) * wide)):
            return "fake_quantize_weight"
        self._weight_scale(weight.ctypes.data, 4, 12, 20, 0, 1.0, 1e-12, True, found.ctypes.data, 1)
        if not np.array_equal(found, best_scales(weight)):
            return "weight_scale"
        sums = (ctypes.c_double * 2)()
        self._energies(x.ctypes.data, None, x.size, 0, scale, -90.0, 80.0, sums, 1)
        error, signal = float(((expected - x).astype(np.float64) ** 2).sum()), float((x.astype(np.float64) ** 2).sum())
        return None if np.allclose(list(sums), [error, signal], rtol=1e-5) else "energies"


def within_int8(limit: int) -> int:
    """The largest level, for kernels, whose tables hold those of 8 bits.

    Raises:
        CCOError: It is another; nothing was read or written.
    """
    if 1 <= limit <= 127:
        return limit
    raise CCOError(f"kernels: expected levels of at most 1 to 127, got {limit}. Nothing was read or written; write 2 to 8 bits.")


def _address(tensor: Tensor, dtype: torch.dtype, count: int) -> int:
    """Address of a tensor's values, for C.

    Args:
        tensor: On the CPU.
        dtype: What C takes its values for.
        count: How many values C reads or writes from the address on.

    Raises:
        CCOError: It is of another type, size or device, or its memory ends earlier.
    """
    if tensor.dtype is dtype and tensor.numel() == count and tensor.is_cpu:
        address, storage = tensor.data_ptr(), tensor.untyped_storage()
        if not count or (address and address + count * dtype.itemsize <= storage.data_ptr() + storage.nbytes()):
            return address
    raise CCOError(
        f"kernels: expected {count} values of {dtype} in memory of the CPU, got {tensor.numel()} of {tensor.dtype}, shape {tuple(tensor.shape)}, on "
        f"{tensor.device}, in {tensor.untyped_storage().nbytes()} bytes. Nothing was read or written; LIGHTNING_CCO_NATIVE=0 runs without kernels."
    )


def _address_like(tensor: Tensor, other: Tensor) -> int:
    """Address of a tensor whose values lie in memory like those of another one, whose own address is checked as well."""
    if tensor.stride() != other.stride() and not (tensor.is_contiguous() and other.is_contiguous()):
        raise CCOError(
            f"kernels: expected two tensors of the same strides, got {tensor.stride()} and {other.stride()} for shape {tuple(other.shape)}. "
            "Nothing was read or written; LIGHTNING_CCO_NATIVE=0 runs without kernels."
        )
    return _address(tensor, other.dtype, other.numel())


def kernels_for(tensor: Tensor) -> Kernels | None:
    """The kernels, if they may work on a tensor now: an ordinary one, dense, on the CPU, of a type that they know, while nobody traces or transforms."""
    if tensor.dtype not in FORMATS or not tensor.is_cpu or not runs_plainly() or not is_plain(tensor):
        return None
    return load() if is_dense(tensor) else None


@functools.cache
def load() -> Kernels | None:
    """The kernels; `None` if they are turned off, or there is no compiler that makes right ones."""
    library = open_library()
    if library is None:
        return None
    try:
        kernels = Kernels(library)
    except AttributeError as error:
        log.warning("lightning_cco: kernels are off, torch operations are used, which are slower: %s.", error)
        return None
    wrong = kernels.wrong()
    if wrong is not None:
        log.warning(
            "lightning_cco: kernels are off, torch operations are used, which are slower: the compiler makes wrong code of '%s'.", wrong
        )
        return None
    return kernels
