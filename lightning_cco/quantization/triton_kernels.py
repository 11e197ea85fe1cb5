"""Fake-quantization on a GPU in one pass over memory, in Triton: the functions of ``kernels.c``, operation by operation in float32, equal to the last bit.

Of 0 and -0 either may come.

What a compiler for GPUs would do otherwise is ruled out: divisions are rounded correctly (``div_rn``), nothing is contracted to a fused multiply-add
(``enable_fp_fusion=False`` at each launch), no function of libdevice is called, since those flush denormal numbers to 0. Scale and zero point are read from the
device's memory, so nothing waits for the host, and a captured CUDA graph sees them move. Tensors are dense: n values in storage order, counted in int64.

Imported where Triton is installed alone (`triton_calls`). Everything here is also run by Triton's interpreter, on CPU tensors.
"""

import triton
import triton.language as tl


@triton.jit
def _nearest(x):
    """To the nearest integer, ties to the even one, as ``rintf``: from 2 ** 23 on there are no fractions, and below adding 2 ** 23 rounds them off."""
    magnitude = tl.abs(x)
    whole = tl.where(magnitude < 8388608.0, (magnitude + 8388608.0) - 8388608.0, magnitude)
    sign = x.to(tl.int32, bitcast=True) & -2147483648  # also of -0.0
    return (whole.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _wide(x):
    """As float32, exactly. bfloat16 by its bits: the interpreter's own conversion from and to it is not the hardware's."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """From float32 to the nearest number of a type, ties to the even one."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        narrow = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = x.to(dtype)
    return narrow


@triton.jit
def _clamped(x, first, last):
    """NaN stays NaN."""
    x = tl.where(x < first, first, x)
    return tl.where(x > last, last, x)


@triton.jit
def _widen(extrema, smallest, largest, broken):
    """Widen the two numbers of ``extrema`` by those of one program, NaN if ``broken``.

    Floats are compared as integers: positive ones in their order, negative ones in the opposite order as unsigned numbers. NaN has the sign that makes it win
    for good. What other programs have written meanwhile can only make a number that is read too weak, never too strong, so most need no atomic operation.
    """
    low = tl.where(broken, -4194304, smallest.to(tl.int32, bitcast=True))  # 0xffc00000
    high = tl.where(broken, 2143289344, largest.to(tl.int32, bitcast=True))  # 0x7fc00000
    low_before, high_before = tl.load(extrema), tl.load(extrema + 1)
    lower = (smallest < low_before) | (broken & (low_before == low_before))
    higher = (largest > high_before) | (broken & (high_before == high_before))
    signed, unsigned = extrema.to(tl.pointer_type(tl.int32)), extrema.to(tl.pointer_type(tl.uint32))
    tl.atomic_min(signed, low, mask=lower & (low >= 0), sem="relaxed")
    tl.atomic_max(unsigned, low.to(tl.uint32, bitcast=True), mask=lower & (low < 0), sem="relaxed")
    tl.atomic_max(signed + 1, high, mask=higher & (high >= 0), sem="relaxed")
    tl.atomic_min(unsigned + 1, high.to(tl.uint32, bitcast=True), mask=higher & (high < 0), sem="relaxed")


@triton.jit
def fake_quantize(
    x,
    y,
    mask,
    extrema,
    scale,
    zero_point,
    n,
    quant_min,
    quant_max,
    below,
    above,
    MASK: tl.constexpr,
    EXTREMA: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Round x to its grid, y = x allowed, as ``fake_quantize`` in C; a program takes ``8 * BYTES`` values.

    ``mask`` gets one bit per value that has a gradient, the first value in the lowest bit; ``extrema`` is widened to the smallest and the largest value, after
    a clamp to below and above.
    """
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    at = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    there = at < n
    value = _wide(tl.load(x + at, mask=there, other=0.0))
    step, zero = tl.load(scale), tl.load(zero_point)
    inverse = tl.div_rn(1.0, step)
    low, high = quant_min - zero, quant_max - zero
    first = tl.where(below > float("-inf"), tl.maximum(low, _nearest(below * inverse)), low)
    last = tl.where(above < float("inf"), tl.minimum(high, _nearest(above * inverse)), high)
    level = _nearest(value * inverse)
    tl.store(y + at, _narrow(_clamped(level, first, last) * step, y.dtype.element_ty), mask=there)
    if MASK:
        inside = there & (level >= low) & (level <= high) & (value > below) & (value < above)
        bits = tl.sum(inside.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
        tl.store(mask + byte, bits.to(tl.uint8), mask=byte * 8 < n)
    if EXTREMA:
        known = there & (value == value)
        smallest = tl.min(tl.min(tl.where(known, value, float("inf")), axis=1), axis=0)
        largest = tl.max(tl.max(tl.where(known, value, float("-inf")), axis=1), axis=0)
        broken = tl.max(tl.max((value != value).to(tl.int32), axis=1), axis=0) > 0
        _widen(extrema, _clamped(smallest, below, above), _clamped(largest, below, above), broken)


@triton.jit
def mask_gradient(grad, out, mask, n, BYTES: tl.constexpr):
    """Copy a gradient to ``out``, which may be ``grad``, and set it to 0 where the mask's bit is 0."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    at = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    there = at < n
    bits = tl.load(mask + byte, mask=byte * 8 < n, other=0).to(tl.int32)
    inside = ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0
    tl.store(out + at, tl.where(inside, tl.load(grad + at, mask=there, other=0.0), 0.0), mask=there)


@triton.jit
def _places(begin, start, stride, inner, RUNS: tl.constexpr, COLUMNS: tl.constexpr, POSITION: tl.constexpr):
    """Which of a channel's values come next, and where they are."""
    position = begin + tl.arange(0, COLUMNS).to(POSITION)[None, :]
    if RUNS:  # the channels' values lie in several runs of `inner` ones
        return position, start + (position // inner) * stride + position % inner
    return position, start + position


@triton.jit
def _clip_ratio(
    weight,
    start,
    stride,
    inner,
    count,
    channel_there,
    inverse,
    limit,
    unit,
    RUNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POSITION: tl.constexpr,
):
    """The ratio of each channel's scale at which clipping and rounding lose least, of equals the largest; as ``clip_ratio`` in C, which counts otherwise.

    A magnitude counts in whole numbers, ``limit * 48 * unit`` for the largest, so that errors are whole numbers, too, and their sums exact in any order.
    """
    most = limit * 48 * unit
    number = tl.arange(0, 64)[None, :]
    errors = tl.zeros([ROWS, 64], tl.int64)
    for begin in range(0, count, COLUMNS):
        position, at = _places(begin, start, stride, inner, RUNS, COLUMNS, POSITION)
        whole = _nearest(tl.abs(_wide(tl.load(weight + at, mask=channel_there & (position < count), other=0.0))) * inverse)
        whole = tl.where(whole > most, most, whole)
        for ratio in range(48):  # from the largest on
            width = (48 - ratio) * unit
            level = (whole * tl.div_rn(1.0, width) + 8388608.0) - 8388608.0  # the nearest
            error = (whole - tl.where(level > limit, limit, level) * width).to(tl.int32)
            total = tl.sum((error * error).to(tl.int64), axis=1)
            errors += tl.where(number == ratio, total[:, None], 0)
    # One number tells the error and, of equal ones, the ratio.
    ranked = tl.where(number < 48, errors * 48 + number, 9223372036854775807)
    best = tl.min(ranked, axis=1) % 48
    return tl.div_rn((48 - best).to(tl.float32), 48.0)[:, None]


@triton.jit(do_not_specialize=["channels"])
def fake_quantize_weight(
    weight,
    out,
    scales,
    channels,
    inner,
    count,
    limit,
    smallest_scale,
    unit,
    RUNS: tl.constexpr,
    MSE: tl.constexpr,
    KNOWN: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POSITION: tl.constexpr,
):
    """Round a weight to the symmetric grid of each channel, in place where out = weight; as ``fake_quantize_weight`` in C.

    Each of the channels has ``count`` values, ``inner`` of them contiguous. A program takes ROWS channels, COLUMNS of their values at once; what it
    reads again comes out of the cache. ``KNOWN``: scales are given; ``KEEP``: they are written.
    """
    channel = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    channel_there = channel < channels
    start, stride = channel * inner, tl.full((), 1, tl.int64) * channels * inner
    if KNOWN:
        step = tl.load(scales + channel, mask=channel_there, other=1.0)
    else:
        magnitudes = tl.zeros([ROWS, COLUMNS], tl.float32)
        nans = tl.zeros([ROWS, COLUMNS], tl.int32)
        for begin in range(0, count, COLUMNS):
            position, at = _places(begin, start, stride, inner, RUNS, COLUMNS, POSITION)
            magnitude = tl.abs(_wide(tl.load(weight + at, mask=channel_there & (position < count), other=0.0)))
            magnitudes = tl.where(magnitude > magnitudes, magnitude, magnitudes)
            nans = nans | (magnitude != magnitude).to(tl.int32)
        largest = tl.max(magnitudes, axis=1)[:, None]
        step = tl.div_rn(largest, limit)
        if MSE:
            counted = (step > smallest_scale) & (step < float("inf"))
            inverse = tl.where(counted, tl.div_rn(1.0, largest) * (limit * 48 * unit), 0.0)
            ratio = _clip_ratio(weight, start, stride, inner, count, channel_there, inverse, limit, unit, RUNS, ROWS, COLUMNS, POSITION)
            step = tl.where(counted, step * ratio, step)
        step = tl.where(step < smallest_scale, smallest_scale, step)
        step = tl.where(tl.max(nans, axis=1)[:, None] > 0, float("nan"), step)
        if KEEP:
            tl.store(scales + channel, step, mask=channel_there)
    inverse_step = tl.div_rn(1.0, step)
    for begin in range(0, count, COLUMNS):
        position, at = _places(begin, start, stride, inner, RUNS, COLUMNS, POSITION)
        there = channel_there & (position < count)
        level = _nearest(_wide(tl.load(weight + at, mask=there, other=0.0)) * inverse_step)
        tl.store(out + at, _narrow(_clamped(level, -limit, limit) * step, out.dtype.element_ty), mask=there)
