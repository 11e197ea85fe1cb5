"""The kernels in ``kernels.c``: compiled on first use, kept in the user's cache, called through ctypes. Without a C compiler there are none.

PyTorch runs fake-quantization as four operations, each of which passes over the memory; one pass costs a quarter. The compiler is the system's own (``CC``,
else ``cc``, ``gcc`` or ``clang``), and takes under a second once per machine. ``LIGHTNING_CCO_NATIVE=0`` turns the kernels off,
``LIGHTNING_CCO_CFLAGS`` holds further flags for the compiler.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_cco.quantization.kernel_library import declare_types, log, open_library
from lightning_cco.quantization.layouts import around, is_dense
from lightning_cco.quantization.native_check import wrong_function
from lightning_cco.quantization.pointer_checks import MOST_SIGNED, MOST_UNSIGNED, address_like, address_of, last_level
from lightning_cco.quantization.tracing import is_plain, runs_plainly

FORMATS = {torch.float32: 0, torch.bfloat16: 1}
_GRAIN = 1 << 15  # values that are not worth a second thread, as in C


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

    Every pointer is checked before C gets it (`address_of`): a tensor of another type, size or device is an error, never a write past its end.

    Args:
        library: The loaded library, with the types of its functions declared.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._around: dict[tuple[torch.Size, tuple[int, ...], int], tuple[int, int, int]] = {}
        self._fake_quantize = library.fake_quantize
        self._round_to_grid = library.round_to_grid
        self._ready_grid = library.ready_grid
        self._widen = library.widen
        self._mask_gradient = library.mask_gradient
        self._fake_quantize_weight = library.fake_quantize_weight
        self._weight_scale = library.weight_scale
        self._affine_weight_scale = library.affine_weight_scale
        self._fake_quantize_affine_weight = library.fake_quantize_affine_weight
        self._fake_quantize_rows = library.fake_quantize_rows
        self._energies = library.energies
        self.move_ranges = library.move_ranges  # called by range_kernel.py

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
        address = address_of(x, dtype, count)
        blocked: int = self._fake_quantize(
            address,
            address if out is x else address_like(out, x),
            count,
            FORMATS[dtype],
            scale,
            *levels,
            *ends,
            *limits,
            None if mask is None else address_of(mask, torch.uint8, (count + 7) // 8),
            None if extrema is None else address_of(extrema, torch.float32, 2),
            torch.get_num_threads(),
        )
        return blocked

    def ready(self, numbers: tuple[float, float], levels: tuple[int, int], limits: tuple[float, float], dtype: torch.dtype) -> ReadyGrid:
        """A grid for `round_made`: scale and zero point, first and last level of the format, limits of the activation."""
        found = (ctypes.c_float * 9)()
        self._ready_grid(*numbers, *levels, *limits, FORMATS[dtype], ctypes.addressof(found))
        return ReadyGrid(bytes(found)[:28], found[7], found[8])

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
            None if extrema is None else address_of(extrema, torch.float32, 2),
            torch.get_num_threads() if count > _GRAIN else 1,
        )
        return not broken

    def widen(self, x: Tensor, limits: tuple[float, float], extrema: Tensor) -> None:
        """Widen ``extrema``, float32 of 2, to the smallest and the largest value of ``x`` after a clamp to the limits."""
        count = x.numel()
        ends = address_of(extrema, torch.float32, 2)
        self._widen(address_of(x, x.dtype, count), count, FORMATS[x.dtype], *limits, ends, torch.get_num_threads())

    def mask_gradient(self, grad: Tensor, out: Tensor, mask: Tensor) -> None:
        """Copy a gradient to ``out`` (which may be ``grad``) and set it to 0 where the mask's bit is 0."""
        count, dtype = grad.numel(), grad.dtype
        bits, address = address_of(mask, torch.uint8, (count + 7) // 8), address_of(grad, dtype, count)
        target = address if out is grad else address_like(out, grad)
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
            address_of(weight, weight.dtype, weight.numel()),
            address_like(out, weight),
            *around(weight, axis),
            FORMATS[weight.dtype],
            last_level(limit, MOST_SIGNED),
            smallest_scale,
            mse,
            None if scales is None else address_of(scales, torch.float32, weight.shape[axis]),
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
            address, address, outer, channels, inner, form, last_level(limit, MOST_SIGNED), smallest_scale, mse, None, False, threads
        )

    def weight_scale(self, weight: Tensor, axis: int, limit: int, smallest_scale: float, scales: Tensor, mse: bool = False) -> None:
        """The scales that `fake_quantize_weight` takes, float32 with one value for each channel."""
        self._weight_scale(
            address_of(weight, weight.dtype, weight.numel()),
            *around(weight, axis),
            FORMATS[weight.dtype],
            last_level(limit, MOST_SIGNED),
            smallest_scale,
            mse,
            address_of(scales, torch.float32, weight.shape[axis]),
            torch.get_num_threads(),
        )

    def fake_quantize_affine_weight(
        self, rows: Tensor, out: Tensor, last: int, smallest_scale: float, qparams: Tensor, known: bool = False, mse: bool = False
    ) -> None:
        """Round the rows of a matrix, each to an affine grid of its own.

        Args:
            rows: (rows, values of each), contiguous.
            out: The same shape and type, contiguous.
            last: Last level, at most 255; the first one is 0.
            smallest_scale: Least scale.
            qparams: float32, (2, rows): scales, and the levels of 0; written unless they are known.
            known: Whether to take them as they are.
            mse: Whether the scales are those at which rounding and clipping lose least, instead of those of the range.
        """
        scales = address_of(qparams, torch.float32, 2 * rows.shape[0])
        both = scales, scales + qparams.shape[1] * qparams.itemsize
        address, target, form = address_of(rows, rows.dtype, rows.numel()), address_like(out, rows), FORMATS[rows.dtype]
        self._fake_quantize_affine_weight(
            address, target, *rows.shape, form, last_level(last, MOST_UNSIGNED), smallest_scale, mse, *both, known, torch.get_num_threads()
        )

    def affine_weight_scale(self, rows: Tensor, last: int, smallest_scale: float, qparams: Tensor, mse: bool = False) -> None:
        """The scales and levels of 0 that `fake_quantize_affine_weight` takes, float32, (2, rows)."""
        scales = address_of(qparams, torch.float32, 2 * rows.shape[0])
        zeros = scales + qparams.shape[1] * qparams.itemsize
        address, form = address_of(rows, rows.dtype, rows.numel()), FORMATS[rows.dtype]
        self._affine_weight_scale(
            address, *rows.shape, form, last_level(last, MOST_UNSIGNED), smallest_scale, mse, scales, zeros, torch.get_num_threads()
        )

    def fake_quantize_rows(self, rows: Tensor, out: Tensor, limit: int) -> None:
        """Round the rows of a contiguous matrix, each to whole multiples of its largest magnitude divided by the largest level, into another one."""
        address, target = address_of(rows, rows.dtype, rows.numel()), address_like(out, rows)
        self._fake_quantize_rows(address, target, *rows.shape, FORMATS[rows.dtype], last_level(limit, MOST_SIGNED), torch.get_num_threads())

    def energies(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Squared norms of ``y - x`` and of ``x``, two tensors of the same type and strides."""
        sums = (ctypes.c_double * 2)()
        count = x.numel()
        self._energies(
            address_of(x, x.dtype, count), address_like(y, x), count, FORMATS[x.dtype], 0.0, 0.0, 0.0, sums, torch.get_num_threads()
        )
        return sums[0], sums[1]

    def rounding_energies(self, x: Tensor, scale: float, levels: tuple[float, float]) -> tuple[float, float]:
        """Squared norms of what rounding to a grid changes, and of ``x``."""
        sums = (ctypes.c_double * 2)()
        count = x.numel()
        self._energies(address_of(x, x.dtype, count), None, count, FORMATS[x.dtype], scale, *levels, sums, torch.get_num_threads())
        return sums[0], sums[1]


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
        declare_types(library)
    except AttributeError as error:
        log.warning("lightning_cco: kernels are off, torch operations are used, which are slower: %s.", error)
        return None
    wrong = wrong_function(library)
    if wrong is not None:
        log.warning(
            "lightning_cco: kernels are off, torch operations are used, which are slower: the compiler makes wrong code of '%s'.", wrong
        )
        return None
    return Kernels(library)
