"""The kernels in C, checked against NumPy when they are loaded."""

from __future__ import annotations

import ctypes
import struct

import numpy as np

from lightning_cco.quantization.kernel_check import Values, best_affine_scales, best_scales, some_values


def wrong_function(library: ctypes.CDLL) -> str | None:
    """Name of a function that computes something else than NumPy, which no mode or default of PyTorch disturbs; `None`: all are right.

    Args:
        library: The library, with the types of its functions declared.
    """
    x, scale = some_values(), np.float32(0.02)
    levels = np.rint(x * (np.float32(1.0) / scale))
    inside = (levels >= -100) & (levels <= 90) & (x > -1.5) & (x < 1.7)
    y, mask, ends = np.empty_like(x), np.zeros((x.size + 7) // 8, np.uint8), np.array([0.0, 0.0], np.float32)
    levels_and_limits = (-90.0, 80.0, -100.0, 90.0, -1.5, 1.7)
    blocked = library.fake_quantize(
        x.ctypes.data, y.ctypes.data, x.size, 0, scale, *levels_and_limits, mask.ctypes.data, ends.ctypes.data, 1
    )
    expected = np.clip(levels, -90, 80) * scale
    if not (
        np.array_equal(y, expected) and blocked == int((~inside).sum()) and np.array_equal(mask, np.packbits(inside, bitorder="little"))
    ):
        return "fake_quantize"
    if not np.array_equal(ends, np.clip([x.min(), x.max()], -1.5, 1.7).astype(np.float32)):
        return "widen"
    library.mask_gradient(x.ctypes.data, y.ctypes.data, mask.ctypes.data, x.size, 0, 1)
    if not np.array_equal(y, np.where(inside, x, np.float32(0.0))):
        return "mask_gradient"
    grid, passing = struct.pack("7f", scale, *levels_and_limits), (ctypes.c_float * 2)()
    library.round_to_grid(x.ctypes.data, y.ctypes.data, x.size, 0, grid, None, 1)
    library.gradient_ends(grid, 0, passing)
    if not (np.array_equal(y, expected) and np.array_equal(inside, (x > passing[0]) & (x < passing[1]))):
        return "round_to_grid"
    ready = np.empty(9, np.float32)
    library.ready_grid(scale, 30.0, 0.0, 255.0, -0.5, 1.7, 0, ready.ctypes.data)
    if not np.array_equal(ready[:7], np.array([scale, -25, 85, -30, 225, -0.5, 1.7], np.float32)):
        return "ready_grid"
    half, rounded = (x.view(np.uint32) >> 16).astype(np.uint16), np.empty(x.size, np.uint16)
    library.fake_quantize(half.ctypes.data, rounded.ctypes.data, x.size, 1, scale, *levels_and_limits, None, None, 1)
    bits = np.clip(np.rint((half.astype(np.uint32) << 16).view(np.float32) * (np.float32(1.0) / scale)), -90, 80) * scale
    bits = bits.astype(np.float32).view(np.uint32)
    if not np.array_equal(rounded, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)):
        return "fake_quantize of bfloat16"
    weight = np.ascontiguousarray(x[:960].reshape(4, 12, 20))
    scales, found, result = np.abs(weight).max(axis=(0, 2)) / np.float32(127.0), np.empty(12, np.float32), np.empty_like(weight)
    library.weight_scale(weight.ctypes.data, 4, 12, 20, 0, 127.0, 1e-12, False, found.ctypes.data, 1)
    library.fake_quantize_weight(weight.ctypes.data, result.ctypes.data, 4, 12, 20, 0, 127.0, 1e-12, False, None, False, 1)
    wide = scales.reshape(1, 12, 1)
    if not (np.array_equal(found, scales) and np.array_equal(result, np.rint(weight * (np.float32(1.0) / wide)) * wide)):
        return "fake_quantize_weight"
    library.weight_scale(weight.ctypes.data, 4, 12, 20, 0, 1.0, 1e-12, True, found.ctypes.data, 1)
    if not np.array_equal(found, best_scales(weight)):
        return "weight_scale"
    rows = weight.reshape(48, 20)
    library.fake_quantize_rows(rows.ctypes.data, result.ctypes.data, 48, 20, 0, 127.0, 1)
    largest = np.abs(rows).max(1, keepdims=True)
    if not np.array_equal(result.reshape(48, 20), np.rint(rows * (np.float32(127) / largest)) * (largest / np.float32(127))):
        return "fake_quantize_rows"
    if not _rounds_affinely(library, weight.reshape(48, 20) + np.float32(0.5)):
        return "fake_quantize_affine_weight"
    if not _moves_ranges(library):
        return "move_ranges"
    sums = (ctypes.c_double * 2)()
    library.energies(x.ctypes.data, None, x.size, 0, scale, -90.0, 80.0, sums, 1)
    error, signal = float(((expected - x).astype(np.float64) ** 2).sum()), float((x.astype(np.float64) ** 2).sum())
    return None if np.allclose(list(sums), [error, signal], rtol=1e-5) else "energies"


def _rounds_affinely(library: ctypes.CDLL, rows: Values) -> bool:
    """Whether rows of 20 weights are rounded to affine grids of 2 bits as NumPy does it, by the scales of their ranges and by those that lose least."""
    for mse in (False, True):
        wanted, zeros = best_affine_scales(rows, mse)
        found, result = np.empty((2, len(rows)), np.float32), np.empty_like(rows)
        addresses = found[0].ctypes.data, found[1].ctypes.data
        library.fake_quantize_affine_weight(rows.ctypes.data, result.ctypes.data, len(rows), 20, 0, 3, 1e-12, mse, *addresses, False, 1)
        scale, zero = wanted[:, None], zeros[:, None]
        expected = np.clip(np.rint(rows * (np.float32(1.0) / scale)), -zero, 3 - zero) * scale
        if not (np.array_equal(found, [wanted, zeros]) and np.array_equal(result, expected)):
            return False
        library.affine_weight_scale(rows.ctypes.data, len(rows), 20, 0, 3, 1e-12, mse, *addresses, 1)
        if not np.array_equal(found, [wanted, zeros]):
            return False
    return True


def _moves_ranges(library: ctypes.CDLL) -> bool:
    """Whether two ranges of 8 bits, [-1, 2] and, with a zero point of 0, [-3, 1], move a quarter towards [-2, 4] as NumPy has it."""
    numbers = np.array([[-2, 4, -1, 2, 0, 0, 1], [-2, 4, -3, 1, 0, 0, 0.5]], np.float32)
    described = b"".join(
        struct.pack("8q", *(row.ctypes.data + 4 * at for at in (0, 2, 3, 4, 5, 6)), 8, symmetric) for symmetric, row in enumerate(numbers)
    )
    outliers, qparams = np.ones(2, np.uint8), np.empty((2, 2), np.float32)
    library.move_ranges(described, 2, False, 0.25, False, 1000.0, None, outliers.ctypes.data, qparams.ctypes.data)
    scale, symmetric_scale = np.float32(3.75) / np.float32(255), np.float32(5) / np.float32(254)
    zero_point = np.rint(np.float32(1.25) / scale)
    expected = [[np.inf, -np.inf, -1.25, 2.5, scale, zero_point, 1], [np.inf, -np.inf, -2.5, 1.25, symmetric_scale, 0, 0.5]]
    same = np.array_equal(numbers, np.array(expected, np.float32)) and np.array_equal(qparams, numbers[:, 4:6].T)
    return same and not outliers.any()
