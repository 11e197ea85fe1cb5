"""What kernels are checked against when they are loaded: NumPy, which no mode or default of PyTorch disturbs."""

from __future__ import annotations

from typing import Any

import numpy as np

Values = np.ndarray[Any, np.dtype[np.float32]]


def some_values() -> Values:
    """1,031 values, float32, from -3.375 to 3.375, most of them small."""
    return np.linspace(-1.5, 1.5, 1031, dtype=np.float32) ** 3


def best_scales(weight: Values) -> Values:
    """The scales of 2 bits at which rounding and clipping lose least, of the channels along axis 1 of a weight with three axes.

    For 2 bits a magnitude counts in 48 * 7 whole numbers; the error of each ratio directly.
    """
    largest = np.abs(weight).max(axis=(0, 2), keepdims=True)
    whole = np.rint(np.abs(weight) * (np.float32(1.0) / largest * np.float32(336)))
    steps = 7.0 * np.arange(48, 0, -1).reshape(-1, 1, 1, 1)
    best = np.square(whole - steps * np.clip(np.rint(whole / steps), 0, 1)).sum(axis=(1, 3)).argmin(axis=0)
    scales: Values = largest.ravel() * (np.arange(48, 0, -1).astype(np.float32) / np.float32(48))[best]
    return scales


def best_affine_scales(rows: Values, mse: bool) -> tuple[Values, Values]:
    """The scales of 2 bits of the rows of a matrix, of their ranges or those at which rounding and clipping lose least, and the levels of 0.

    A value counts in whole numbers, 48 * 3 * 4 for the range; the error of each ratio directly.
    """
    low, high = np.minimum(rows.min(1, keepdims=True), 0), np.maximum(rows.max(1, keepdims=True), 0)
    span = high - low
    scales = span / np.float32(3)
    zeros = np.rint(-low / scales)
    if mse:
        whole = np.rint(rows * (np.float32(1.0) / span * np.float32(576)))
        steps = 4.0 * np.arange(48, 0, -1).reshape(-1, 1, 1)
        best = np.square(whole - steps * np.clip(np.rint(whole / steps), -zeros, 3 - zeros)).sum(axis=2).argmin(axis=0)
        scales = scales * (np.arange(48, 0, -1).astype(np.float32) / np.float32(48))[best][:, None]
    return scales.ravel(), zeros.ravel()
