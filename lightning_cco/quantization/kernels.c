/* Fake-quantization on a CPU in one pass over memory.
 *
 * Each function computes exactly what the torch operations in fake_quantize.py compute, operation by operation in float32, so that results are equal to
 * the last bit whether a compiler is there or not. Tensors are dense: n values in storage order. Values come as float32 (half = 0) or bfloat16
 * (half = 1); the arithmetic is in float32.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 512       /* values worked on at once: they stay in the first-level cache; a multiple of 64 */
#define GRAIN (1 << 15) /* fewer values than this per thread are not worth a second thread */

static int threads_for(int64_t n, int threads) {
    int64_t most = n / GRAIN + 1;
    return most < threads ? (int)most : threads;
}

static inline float from_half(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

static inline uint16_t to_half(float value) { /* to nearest even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0; /* NaN */
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline void load(const void *from, int64_t at, int count, int half, float *to) {
    if (half)
        for (int i = 0; i < count; i++) to[i] = from_half(((const uint16_t *)from)[at + i]);
    else
        memcpy(to, (const float *)from + at, (size_t)count * 4);
}

static inline void store(const float *from, int64_t at, int count, int half, void *to) {
    if (half)
        for (int i = 0; i < count; i++) ((uint16_t *)to)[at + i] = to_half(from[i]);
    else
        memcpy((float *)to + at, from, (size_t)count * 4);
}

/* One bit per value, the first value in the lowest bit. */
static inline void pack(const uint8_t *inside, uint8_t *bits, int count) {
    for (int i = 0; i < count / 8; i++) {
        uint64_t eight;
        memcpy(&eight, inside + 8 * i, 8);
        bits[i] = (uint8_t)((eight * 0x0102040810204080ull) >> 56);
    }
    if (count % 8) {
        uint8_t last = 0;
        for (int k = 0; k < count % 8; k++) last |= (uint8_t)(inside[count / 8 * 8 + k] << k);
        bits[count / 8] = last;
    }
}

/* Widen two numbers to the smallest and the largest of some values; returns whether there is a NaN. */
static inline int range_of(const float *value, int count, float *smallest, float *largest) {
    float low = INFINITY, high = -INFINITY;
    int broken = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : broken)
    for (int i = 0; i < count; i++) {
        low = value[i] < low ? value[i] : low;
        high = value[i] > high ? value[i] : high;
        broken |= value[i] != value[i];
    }
    *smallest = low < *smallest ? low : *smallest;
    *largest = high > *largest ? high : *largest;
    return broken;
}

/* Widen extrema to a range limited by below and above. */
static void widen_to(float smallest, float largest, int broken, float below, float above, float *extrema) {
    if (broken) {
        extrema[0] = extrema[1] = NAN;
    } else if (smallest <= largest) {
        smallest = smallest < below ? below : smallest > above ? above : smallest;
        largest = largest < below ? below : largest > above ? above : largest;
        extrema[0] = smallest < extrema[0] ? smallest : extrema[0];
        extrema[1] = largest > extrema[1] ? largest : extrema[1];
    }
}

/* Round floats to a grid, y = x allowed; returns whether a level lies outside of low ... high, or is NaN. */
static inline int round_floats(const float *x, float *y, int count, float inverse, float scale, float first, float last, float low, float high) {
    int outside = 0;
#pragma omp simd reduction(| : outside)
    for (int i = 0; i < count; i++) {
        const float level = rintf(x[i] * inverse);
        float clamped = level < first ? first : level;
        clamped = clamped > last ? last : clamped;
        y[i] = clamped * scale;
        outside |= !((level >= low) & (level <= high));
    }
    return outside;
}

/* Round x to its grid, from the level `first` to the level `last`.
 *
 * mask:    null, or (n + 7) / 8 bytes for one bit per value that has a gradient: its level, before it is clamped, is one of low ... high, and the
 *          value itself lies between below and above, the ends excluded.
 * extrema: null, or two numbers that widen to the smallest and the largest value of x, limited by below and above; NaN if there is one.
 * Returns how many values have no gradient; without a mask, how many are NaN.
 */
int64_t fake_quantize(const void *x, void *y, int64_t n, int half, float scale, float first, float last, float low, float high, float below,
                      float above, uint8_t *mask, float *extrema, int threads) {
    const float inverse = 1.0f / scale;
    const int bounded = below > -INFINITY || above < INFINITY;
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    int64_t blocked = 0;
    float smallest = INFINITY, largest = -INFINITY;
    int broken = 0;
#pragma omp parallel num_threads(threads_for(n, threads)) reduction(+ : blocked) reduction(min : smallest) reduction(max : largest) reduction(| : broken)
    {
        float value[BLOCK], result[BLOCK];
        uint8_t inside[BLOCK];
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t at = block * BLOCK;
            const int count = n - at < BLOCK ? (int)(n - at) : BLOCK;
            if (!half && !mask) { /* without a copy */
                const float *from = (const float *)x + at;
                float *to = (float *)y + at;
                if (extrema) broken |= range_of(from, count, &smallest, &largest);
                if (round_floats(from, to, count, inverse, scale, first, last, low, high))
                    for (int i = 0; i < count; i++) blocked += to[i] != to[i];
                continue;
            }
            load(x, at, count, half, value);
            if (extrema) broken |= range_of(value, count, &smallest, &largest);
            const int outside = round_floats(value, result, count, inverse, scale, first, last, low, high);
            store(result, at, count, half, y);
            if (!mask) {
                for (int i = 0; outside && i < count; i++) blocked += value[i] != value[i];
                continue;
            }
            if (!outside && !bounded) {
                memset(mask + at / 8, 0xff, (size_t)(count + 7) / 8);
                continue;
            }
            int kept = 0;
            for (int i = 0; i < count; i++) {
                const float level = rintf(value[i] * inverse);
                inside[i] = (level >= low) & (level <= high) & (value[i] > below) & (value[i] < above);
                kept += inside[i];
            }
            blocked += count - kept;
            pack(inside, mask + at / 8, count);
        }
    }
    if (extrema) widen_to(smallest, largest, broken, below, above, extrema);
    return blocked;
}

/* The same for what a quantizer keeps ready: scale, first, last, low, high, below, above. */
int64_t round_to_grid(const void *x, void *y, int64_t n, int half, const float *grid, float *extrema, int threads) {
    return fake_quantize(x, y, n, half, grid[0], grid[1], grid[2], grid[3], grid[4], grid[5], grid[6], 0, extrema, threads);
}

/* The number at a place in the order of all numbers of a type, 0 at place 0. */
static float at_place(int32_t place, int half) {
    uint32_t bits = place < 0 ? (uint32_t)-place : (uint32_t)place;
    float value;
    if (half) bits <<= 16;
    if (place < 0) bits |= 0x80000000u;
    memcpy(&value, &bits, 4);
    return value;
}

/* Values that have a gradient (see `fake_quantize`) lie between two numbers of their type, since rounding is monotone: the largest below all of them, and
 * the smallest above. */
void gradient_ends(const float *grid, int half, float *ends) {
    const float inverse = 1.0f / grid[0], low = grid[3], high = grid[4], below = grid[5], above = grid[6];
    const int32_t most = half ? 0x7f80 : 0x7f800000; /* infinity */
    int32_t under = -most, over = most;
    while (over - (int64_t)under > 1) { /* `under` has no gradient, and nothing below it */
        const int32_t middle = (int32_t)(((int64_t)under + over) >> 1);
        const float value = at_place(middle, half);
        if (rintf(value * inverse) >= low && value > below) over = middle;
        else under = middle;
    }
    ends[0] = at_place(under, half);
    under = -most, over = most;
    while (over - (int64_t)under > 1) { /* `over` has none, and nothing above it */
        const int32_t middle = (int32_t)(((int64_t)under + over) >> 1);
        const float value = at_place(middle, half);
        if (rintf(value * inverse) <= high && value < above) under = middle;
        else over = middle;
    }
    ends[1] = at_place(over, half);
}

/* What `round_to_grid` and autograd need of a format: scale, first, last, low, high, below, above, then the ends of `gradient_ends`. Nine numbers. The levels
 * are those of `grid_of` in qparams.py. */
void ready_grid(float scale, float zero_point, float quant_min, float quant_max, float below, float above, int half, float *grid) {
    const float inverse = 1.0f / scale, low = quant_min - zero_point, high = quant_max - zero_point;
    const float first = below > -INFINITY ? rintf(below * inverse) : low, last = above < INFINITY ? rintf(above * inverse) : high;
    grid[0] = scale;
    grid[1] = first > low ? first : low;
    grid[2] = last < high ? last : high;
    grid[3] = low, grid[4] = high, grid[5] = below, grid[6] = above;
    gradient_ends(grid, half, grid + 7);
}

/* Widen two numbers to the smallest and the largest value of x, limited by below and above; NaN if there is one. */
void widen(const void *x, int64_t n, int half, float below, float above, float *extrema, int threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    float smallest = INFINITY, largest = -INFINITY;
    int broken = 0;
#pragma omp parallel for schedule(static) num_threads(threads_for(n, threads)) reduction(min : smallest) reduction(max : largest) reduction(| : broken)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t at = block * BLOCK;
        const int count = n - at < BLOCK ? (int)(n - at) : BLOCK;
        float value[BLOCK];
        load(x, at, count, half, value);
        broken |= range_of(value, count, &smallest, &largest);
    }
    widen_to(smallest, largest, broken, below, above, extrema);
}

/* Set gradients to 0 where the mask's bit is 0. `to` may be `from`. */
void mask_gradient(const void *from, void *to, const uint8_t *mask, int64_t n, int half, int threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    const size_t size = half ? 2 : 4;
#pragma omp parallel for schedule(static) num_threads(threads_for(n, threads))
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t at = block * BLOCK;
        const int count = n - at < BLOCK ? (int)(n - at) : BLOCK;
        const uint8_t *bits = mask + at / 8;
        const uint8_t *source = (const uint8_t *)from + at * size;
        uint8_t *target = (uint8_t *)to + at * size;
        int all = count == BLOCK;
        for (int i = 0; all && i < BLOCK / 64; i++) {
            uint64_t word;
            memcpy(&word, bits + 8 * i, 8);
            all = word == UINT64_MAX;
        }
        if (all) {
            if (from != to) memcpy(target, source, size * BLOCK);
            continue;
        }
        uint8_t inside[BLOCK];
        for (int i = 0; i < (count + 7) / 8; i++) {
            const uint64_t eight = bits[i] * 0x0101010101010101ull & 0x8040201008040201ull;
            memcpy(inside + 8 * i, &eight, 8);
        }
        if (half)
            for (int i = 0; i < count; i++) ((uint16_t *)target)[i] = inside[i] ? ((const uint16_t *)source)[i] : 0;
        else
            for (int i = 0; i < count; i++) ((float *)target)[i] = inside[i] ? ((const float *)source)[i] : 0.0f;
    }
}

/* Clip ratios of a weight's scale that are tried: 1/48, 2/48, ... 1. A magnitude counts in whole numbers of limit * 48 * unit for the largest, so that each
 * step of a grid is a whole number, and sums of squared errors are, too: exact in any order, which makes the choice the same here and in torch. */
#define RATIOS 48
#define FINEST (127 * RATIOS)

static inline int unit_of(int limit) { /* about three hundred whole numbers at least; as weight_clipping.py has it */
    return limit < 7 ? 7 / limit : 1;
}

/* The ratio at which clipping and rounding of one channel together lose least; of equals the largest.
 *
 * The magnitudes are counted once, whatever the number of ratios. That u is rounded to the q-th step instead of the one before it, which is nearer from
 * (q - 1/2) * step on, lowers its squared error by 2 * step * u - (2 * q - 1) * step ** 2; the sums of both over all u from there on are read off.
 */
static float clip_ratio(const void *weight, int64_t outer, int64_t channels, int64_t inner, int half, int64_t channel, int limit, float largest) {
    const int unit = unit_of(limit), most = limit * RATIOS * unit;
    const float inverse = 1.0f / largest * (float)most;
    int32_t count[FINEST + 1], whole[BLOCK];
    int64_t values[FINEST + 1], sums[FINEST + 1]; /* of all magnitudes from one on: how many, and their sum */
    float value[BLOCK];
    memset(count, 0, sizeof(int32_t) * (size_t)(most + 1));
    for (int64_t row = 0; row < outer; row++)
        for (int64_t i = 0; i < inner; i += BLOCK) {
            const int block = inner - i < BLOCK ? (int)(inner - i) : BLOCK;
            load(weight, (row * channels + channel) * inner + i, block, half, value);
            for (int j = 0; j < block; j++) {
                const float scaled = rintf(fabsf(value[j]) * inverse);
                whole[j] = (int32_t)(scaled > (float)most ? (float)most : scaled);
            }
            for (int j = 0; j < block; j++) count[whole[j]]++;
        }
    int64_t number = 0, sum = 0;
    for (int u = most; u >= 0; u--) {
        number += count[u], sum += (int64_t)count[u] * u;
        values[u] = number, sums[u] = sum;
    }
    int best = RATIOS;
    int64_t most_gained = -1;
    for (int ratio = RATIOS; ratio > 0; ratio--) {
        const int64_t step = (int64_t)ratio * unit;
        int64_t gained = 0;
        for (int64_t odd = 1; odd < 2 * limit; odd += 2) {
            const int64_t from = (odd * step + 1) / 2;
            gained += 2 * sums[from] - odd * step * values[from];
        }
        gained *= step;
        if (gained > most_gained) most_gained = gained, best = ratio;
    }
    return (float)best / RATIOS;
}

/* Scale of one channel of a weight of outer x channels x inner values: largest magnitude / limit, with `mse` times the best clip ratio; at least
 * `smallest`. */
static float scale_of(const void *weight, int64_t outer, int64_t channels, int64_t inner, int half, int64_t channel, float limit, float smallest,
                      int mse) {
    float buffer[BLOCK], largest = 0.0f;
    int broken = 0;
    for (int64_t row = 0; row < outer; row++)
        for (int64_t i = 0; i < inner; i += BLOCK) {
            const int count = inner - i < BLOCK ? (int)(inner - i) : BLOCK;
            const int64_t at = (row * channels + channel) * inner + i;
            const float *value = half ? buffer : (const float *)weight + at;
            if (half) load(weight, at, count, half, buffer);
#pragma omp simd reduction(max : largest) reduction(| : broken)
            for (int j = 0; j < count; j++) {
                const float magnitude = fabsf(value[j]);
                largest = magnitude > largest ? magnitude : largest;
                broken |= magnitude != magnitude;
            }
        }
    if (broken) return NAN;
    float scale = largest / limit;
    if (mse && scale > smallest && scale < INFINITY)
        scale *= clip_ratio(weight, outer, channels, inner, half, channel, (int)limit, largest);
    return scale < smallest ? smallest : scale;
}

/* The scales of all channels. */
void weight_scale(const void *weight, int64_t outer, int64_t channels, int64_t inner, int half, float limit, float smallest, int mse, float *scales,
                  int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(outer * channels * inner, threads))
    for (int64_t channel = 0; channel < channels; channel++)
        scales[channel] = scale_of(weight, outer, channels, inner, half, channel, limit, smallest, mse);
}

/* Round a weight to the symmetric grid of each channel, from -limit to limit, by the scale that `scale_of` gives.
 *
 * The weight is outer x channels x inner values; a channel's are read two or three times, after the first time out of the cache.
 *
 * scales: null, or one value for each channel. With `known` they are given, and only the last reading takes place; else they are written.
 */
void fake_quantize_weight(const void *weight, void *result, int64_t outer, int64_t channels, int64_t inner, int half, float limit, float smallest,
                          int mse, float *scales, int known, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(outer * channels * inner, threads))
    for (int64_t channel = 0; channel < channels; channel++) {
        const float scale = known ? scales[channel] : scale_of(weight, outer, channels, inner, half, channel, limit, smallest, mse);
        const float inverse = 1.0f / scale;
        for (int64_t row = 0; row < outer; row++)
            for (int64_t i = 0; i < inner; i += BLOCK) {
                const int count = inner - i < BLOCK ? (int)(inner - i) : BLOCK;
                const int64_t at = (row * channels + channel) * inner + i;
                if (half) {
                    float value[BLOCK];
                    load(weight, at, count, half, value);
                    round_floats(value, value, count, inverse, scale, -limit, limit, -limit, limit);
                    store(value, at, count, half, result);
                } else {
                    round_floats((const float *)weight + at, (float *)result + at, count, inverse, scale, -limit, limit, -limit, limit);
                }
            }
        if (scales && !known) scales[channel] = scale;
    }
}

/* Scale and zero level of one row of weights on an affine grid of levels 0 ... last: (highest - lowest) / last, the range widened to contain 0. With `mse` the
 * scale is the one of 1/48, 2/48, ... 1 of that at which rounding and clipping together lose least, the zero level staying; of equals the largest. Values
 * count in whole numbers of last * 48 * unit for the range, whose sums are exact: the choice is that of affine_weights.py.
 */
static void affine_of(const void *weight, int64_t at, int64_t n, int half, int last, float smallest, int mse, float *scale_found, float *zero_found) {
    float buffer[BLOCK], lowest = 0.0f, highest = 0.0f;
    int broken = 0;
    for (int64_t i = 0; i < n; i += BLOCK) {
        const int count = n - i < BLOCK ? (int)(n - i) : BLOCK;
        const float *value = half ? buffer : (const float *)weight + at + i;
        if (half) load(weight, at + i, count, half, buffer);
#pragma omp simd reduction(max : highest) reduction(min : lowest) reduction(| : broken)
        for (int j = 0; j < count; j++) {
            highest = value[j] > highest ? value[j] : highest;
            lowest = value[j] < lowest ? value[j] : lowest;
            broken |= value[j] != value[j];
        }
    }
    const float span = highest - lowest;
    float scale = span / (float)last;
    if (broken) scale = NAN;
    const float least = scale < smallest ? smallest : scale;
    float zero = rintf(-lowest / least);
    zero = zero > (float)last ? (float)last : zero;
    if (mse && scale > smallest && scale < INFINITY) {
        const int unit = last < 14 ? 14 / last : 1, most = last * RATIOS * unit;
        const float inverse = 1.0f / span * (float)most, first = -zero, end = (float)last - zero;
        int64_t errors[RATIOS + 1] = {0};
        float whole[BLOCK];
        for (int64_t i = 0; i < n; i += BLOCK) {
            const int count = n - i < BLOCK ? (int)(n - i) : BLOCK;
            const float *value = half ? buffer : (const float *)weight + at + i;
            if (half) load(weight, at + i, count, half, buffer);
            for (int j = 0; j < count; j++) whole[j] = rintf(value[j] * inverse);
            for (int ratio = 1; ratio <= RATIOS; ratio++) {
                const float step = (float)(ratio * unit), inverse_step = 1.0f / step;
                int64_t sum = 0;
                for (int from = 0; from < count; from += 16) { /* 16 squares of at most 12,240 fit into 32 bits */
                    const int to = from + 16 < count ? from + 16 : count;
                    uint32_t part = 0;
#pragma omp simd reduction(+ : part)
                    for (int j = from; j < to; j++) {
                        float level = rintf(whole[j] * inverse_step);
                        level = level < first ? first : level;
                        level = level > end ? end : level;
                        const int32_t error = (int32_t)(whole[j] - level * step);
                        part += (uint32_t)(error * error);
                    }
                    sum += part;
                }
                errors[ratio] += sum;
            }
        }
        int best = RATIOS;
        for (int ratio = RATIOS - 1; ratio > 0; ratio--)
            if (errors[ratio] < errors[best]) best = ratio;
        scale *= (float)best / RATIOS;
    }
    *scale_found = scale < smallest ? smallest : scale;
    *zero_found = zero;
}

/* Scale and zero level of all rows. */
void affine_weight_scale(const void *weight, int64_t rows, int64_t n, int half, int last, float smallest, int mse, float *scales, float *zeros, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * n, threads))
    for (int64_t row = 0; row < rows; row++) affine_of(weight, row * n, n, half, last, smallest, mse, scales + row, zeros + row);
}

/* Round rows of n weights each to the affine grid of each row, by scale and zero level as `affine_of` gives them, or as they are `known`. */
void fake_quantize_affine_weight(const void *weight, void *result, int64_t rows, int64_t n, int half, int last, float smallest, int mse, float *scales,
                                 float *zeros, int known, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * n, threads))
    for (int64_t row = 0; row < rows; row++) {
        if (!known) affine_of(weight, row * n, n, half, last, smallest, mse, scales + row, zeros + row);
        const float scale = scales[row], inverse = 1.0f / scale, first = -zeros[row], end = (float)last - zeros[row];
        for (int64_t i = 0; i < n; i += BLOCK) {
            const int count = n - i < BLOCK ? (int)(n - i) : BLOCK;
            if (half) {
                float value[BLOCK];
                load(weight, row * n + i, count, half, value);
                round_floats(value, value, count, inverse, scale, first, end, first, end);
                store(value, row * n + i, count, half, result);
            } else {
                round_floats((const float *)weight + row * n + i, (float *)result + row * n + i, count, inverse, scale, first, end, first, end);
            }
        }
    }
}

/* Round rows of n values each to whole multiples of the row's largest magnitude / limit; the arithmetic is that of dynamic_activations.py. */
void fake_quantize_rows(const void *x, void *y, int64_t rows, int64_t n, int half, float limit, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows * n, threads))
    for (int64_t row = 0; row < rows; row++) {
        float buffer[BLOCK], largest = 0.0f;
        int broken = 0;
        for (int64_t i = 0; i < n; i += BLOCK) {
            const int count = n - i < BLOCK ? (int)(n - i) : BLOCK;
            const float *value = half ? buffer : (const float *)x + row * n + i;
            if (half) load(x, row * n + i, count, half, buffer);
#pragma omp simd reduction(max : largest) reduction(| : broken)
            for (int j = 0; j < count; j++) {
                const float magnitude = fabsf(value[j]);
                largest = magnitude > largest ? magnitude : largest;
                broken |= magnitude != magnitude;
            }
        }
        if (broken) largest = NAN;
        const float scale = largest / limit, by = limit / largest, inverse = by > FLT_MAX ? 0.0f : by;
        for (int64_t i = 0; i < n; i += BLOCK) {
            const int count = n - i < BLOCK ? (int)(n - i) : BLOCK;
            const float *value = half ? buffer : (const float *)x + row * n + i;
            float *target = half ? buffer : (float *)y + row * n + i;
            if (half) load(x, row * n + i, count, half, buffer);
            for (int j = 0; j < count; j++) target[j] = rintf(value[j] * inverse) * scale;
            if (half) store(buffer, row * n + i, count, half, y);
        }
    }
}

/* Where the numbers of one quantizer's range are, and its format. */
struct range {
    float *extrema, *min_val, *max_val, *scale, *zero_point, *clip_ratio;
    int64_t num_bits, symmetric;
};

static inline float width(float low, float high) { return (high < 0.0f ? 0.0f : high) - (low > 0.0f ? 0.0f : low); }

static inline float towards(float from, float to, float share, int from_end) { return from_end ? to + (to - from) * share : from + (to - from) * share; }

/* Let ranges follow their extrema, which are then forgotten; the arithmetic is that of range_updates.py and of `affine_qparams` in qparams.py.
 *
 * widens:   whether they widen to the extrema, instead of moving towards them by `share`, counted from there if `from_end`.
 * outlier:  how many times as wide as a range an outlier is.
 * before:   null, or which ranges met an outlier the last time; `outliers`: which do now.
 * qparams:  takes the scales of all, then their zero points.
 */
void move_ranges(const struct range *ranges, int64_t n, int widens, float share, int from_end, float outlier, const uint8_t *before, uint8_t *outliers,
                 float *qparams) {
    int first = 0;
    for (int64_t i = 0; i < n; i++) {
        const float low = ranges[i].extrema[0], high = ranges[i].extrema[1], least = *ranges[i].min_val, most = *ranges[i].max_val;
        const int seen = isfinite(low) && isfinite(high) && (low != 0.0f || high != 0.0f), empty = least == 0.0f && most == 0.0f;
        const int met = before && before[i];
        outliers[i] = seen ? !empty && width(low, high) > outlier * width(least, most) : met; /* where nothing passed, the last batch is the one before */
        first |= outliers[i] && !met;
    }
    for (int64_t i = 0; i < n; i++) {
        const struct range *const range = ranges + i;
        const float ratio = widens ? 1.0f : *range->clip_ratio, low = range->extrema[0] * ratio, high = range->extrema[1] * ratio;
        float least = *range->min_val, most = *range->max_val;
        const int seen = isfinite(range->extrema[0]) && isfinite(range->extrema[1]) && (range->extrema[0] != 0.0f || range->extrema[1] != 0.0f);
        const int again = seen && outliers[i] && before && before[i], empty = least == 0.0f && most == 0.0f;
        if (again || (seen && !first)) {
            if (widens) {
                least = low < least ? low : least;
                most = high > most ? high : most;
            } else {
                least = again || empty ? low : towards(least, low, share, from_end);
                most = again || empty ? high : towards(most, high, share, from_end);
            }
        }
        const int last = (1 << range->num_bits) - 1, limit = (1 << (range->num_bits - 1)) - 1;
        const float bottom = least > 0.0f ? 0.0f : least, top = most < 0.0f ? 0.0f : most;
        const float span = range->symmetric ? 2.0f * (-bottom > top || bottom != bottom ? -bottom : top) : top - bottom;
        float scale = (span > 0.0f ? span : 1.0f) / (float)(range->symmetric ? 2 * limit : last), zero_point = 0.0f;
        scale = scale < 1e-12f ? 1e-12f : scale;
        if (!range->symmetric) {
            zero_point = rintf(0.0f - bottom / scale);
            zero_point = zero_point < 0.0f ? 0.0f : zero_point > (float)last ? (float)last : zero_point;
        }
        *range->min_val = least, *range->max_val = most;
        *range->scale = qparams[i] = scale, *range->zero_point = qparams[n + i] = zero_point;
        range->extrema[0] = INFINITY, range->extrema[1] = -INFINITY;
    }
}

/* Squared norms of y - x and of x, summed in float64 over blocks summed in float32. With a scale, y is x rounded to its grid, and need not be there. */
void energies(const void *x, const void *y, int64_t n, int half, float scale, float first, float last, double *sums, int threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    double error = 0.0, signal = 0.0;
#pragma omp parallel for schedule(static) num_threads(threads_for(n, threads)) reduction(+ : error, signal)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t at = block * BLOCK;
        const int count = n - at < BLOCK ? (int)(n - at) : BLOCK;
        float value[BLOCK], other[BLOCK];
        load(x, at, count, half, value);
        if (scale > 0.0f) {
            for (int i = 0; i < count; i++) {
                const float level = rintf(value[i] * inverse);
                float clamped = level < first ? first : level;
                clamped = clamped > last ? last : clamped;
                other[i] = clamped * scale;
            }
            if (half)
                for (int i = 0; i < count; i++) other[i] = from_half(to_half(other[i]));
        } else {
            load(y, at, count, half, other);
        }
        float differences = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : differences, squares)
        for (int i = 0; i < count; i++) {
            const float difference = other[i] - value[i];
            differences += difference * difference;
            squares += value[i] * value[i];
        }
        error += differences, signal += squares;
    }
    sums[0] = error, sums[1] = signal;
}
