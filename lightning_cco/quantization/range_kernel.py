"""The ranges of all quantizers moved by one call of C: by operations of PyTorch it takes about 150, on one number each."""

from __future__ import annotations

import ctypes
import operator
import struct
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_cco.compat.modules import buffers_of
from lightning_cco.quantization.activation_quantizer import ActivationQuantizer
from lightning_cco.quantization.native import load
from lightning_cco.quantization.pointer_checks import address_of
from lightning_cco.quantization.tracing import is_plain, runs_plainly

_BUFFERS = ("extrema", "min_val", "max_val", "scale", "zero_point", "clip_ratio")  # in the order of the C struct
_in_order = operator.itemgetter(*_BUFFERS)


class Place:
    """Where the numbers of a range are in memory, checked once: as long as the buffers are the same tensors at the same addresses.

    Args:
        buffers: The buffers of a quantizer, in the order of `_BUFFERS`.
        addresses: Their addresses.
        num_bits: Its number of bits.
        symmetric: Whether its zero point is 0.

    Attributes:
        fits: Whether C may work on them.
        described: The struct that C reads.
    """

    __slots__ = ("addresses", "buffers", "described", "fits")

    def __init__(self, buffers: tuple[Tensor, ...], addresses: tuple[int, ...], num_bits: int, symmetric: bool) -> None:
        self.buffers, self.addresses = buffers, addresses
        self.fits = all(
            buffer.is_cpu and buffer.dtype is torch.float32 and is_plain(buffer) and not buffer.is_inference() for buffer in buffers
        )
        self.described = b""
        if self.fits:
            for buffer, count in zip(buffers, (2, 1, 1, 1, 1, 1), strict=True):
                address_of(buffer, torch.float32, count)
            self.described = struct.pack("8q", *addresses, num_bits, symmetric)


_places: WeakKeyDictionary[ActivationQuantizer, Place] = WeakKeyDictionary()


def _place_of(quantizer: ActivationQuantizer) -> Place:
    buffers = _in_order(buffers_of(quantizer))
    addresses = tuple(map(Tensor.data_ptr, buffers))
    known = _places.get(quantizer)
    if known is None or known.addresses != addresses or not all(map(operator.is_, known.buffers, buffers)):
        known = _places[quantizer] = Place(buffers, addresses, quantizer.num_bits, quantizer.symmetric)
    return known


def move_by_kernel(quantizers: Sequence[ActivationQuantizer], outlier: float, outliers_before: Tensor | None) -> Tensor | None:
    """Let ranges follow what has passed, as `update_ranges` says, and forget that.

    Args:
        quantizers: Those that move.
        outlier: How many times as wide as its range the values of an outlier are.
        outliers_before: Which met one in the last update, bool, one for each quantizer.

    Returns:
        Which met one in the last batch that said something, bool; `None` where the kernel can't be used, and nothing has changed.
    """
    kernels = load() if runs_plainly() else None
    if kernels is None or not quantizers[0].min_val.is_cpu:
        return None
    places = [_place_of(quantizer) for quantizer in quantizers]
    if not all(place.fits for place in places):
        return None
    count, share = len(places), quantizers[0].averaging_constant
    before = None if outliers_before is None else address_of(outliers_before, torch.bool, count)
    outliers, qparams = torch.empty(count, dtype=torch.bool, device="cpu"), (ctypes.c_float * (2 * count))()
    described, widens, from_end = b"".join([place.described for place in places]), quantizers[0].estimator == "min_max", share >= 0.5
    kernels.move_ranges(
        described,
        count,
        widens,
        share - 1.0 if from_end else share,
        from_end,
        outlier,
        before,
        outliers.data_ptr(),
        ctypes.addressof(qparams),
    )
    torch.autograd.graph.increment_version([buffer for place in places for buffer in place.buffers[:5]])
    found = qparams[:]
    for quantizer, scale, zero_point in zip(quantizers, found[:count], found[count:], strict=True):
        quantizer.note_numbers(scale, zero_point)
    return outliers
