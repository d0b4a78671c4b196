/* The two loops that see every weight, the range of each group and its codes, and the rounding of
   what is stored with them.

   What is per group (scales, zero points) is computed between them in Python, but for MLX and for
   NNCF's symmetric groups, for which phiship_quantize does everything. kernels.py calls this file
   through ctypes, and has the two loops in NumPy for machines without a compiler, as mlx.py and
   nncf.py have their grids; tests hold both equal bit for bit.

   Build with -ffp-contract=off: a fused multiply-add would round once where the formats round twice.
   Plain C99, no Python headers. Little-endian, as the files are. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "cpu.h"

/* Whether fmaf is an instruction; where it is not, it takes longer than a division. */
#if defined(FP_FAST_FMAF)
#define HAS_FMA 1
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define HAS_FMA __builtin_cpu_supports("fma")
#else
#define HAS_FMA 0
#endif

enum { BF16, F16, F32 };
enum { MULTIPLY_ADD_TRUNCATE, SUBTRACT_DIVIDE_ROUND, DIVIDE_ADD_ROUND, BY_RECIPROCAL };
enum { STREAM, HALVES, SIGNED };
enum { MLX, NNCF };
enum { DONE, NOT_FINITE, TOO_LARGE };

#define CHUNK 512 /* weights at a time; they and their codes stay in the first-level cache */
#define BLOCK 8192 /* weights from range to codes; they stay in the first two levels */
#define AHEAD 4096 /* bytes; a page: within one, processors look ahead themselves */
#define MLX_LEAST_STEP 1e-7f
#define NNCF_LEAST_STEP 0x1p-23f

/* Calls with a count the compiler knows: the loop of a whole group then has neither start nor rest. */
#define WITH_KNOWN_COUNT(count, call) \
    switch (count) {                  \
    case 16: { enum { n = 16 }; call; break; } \
    case 32: { enum { n = 32 }; call; break; } \
    case 64: { enum { n = 64 }; call; break; } \
    case 128: { enum { n = 128 }; call; break; } \
    default: { size_t n = count; call; } \
    }

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float half_to_float(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    uint32_t infinite = (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
    uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
    return as_float(finite | infinite | (uint32_t)(half & 0x8000) << 16);
}

/* The nearest float16, ties to even, as a float; infinite beyond 65504. */
static inline float round_to_half(float value) {
    uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffff;
    uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1)) & ~0x1fffu;
    uint32_t tiny = as_bits(as_float(magnitude) + 0.5f + 0.25f - 0.75f);
    uint32_t rounded = magnitude < 0x38800000 ? tiny : normal;
    rounded = rounded > 0x477fe000 && magnitude <= 0x7f800000 ? 0x7f800000 : rounded;
    return as_float(rounded | (bits & 0x80000000));
}

static inline uint16_t float_to_bf16(float value) {
    uint32_t bits = as_bits(value);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline uint16_t float_to_half(float value) {
    uint32_t bits = as_bits(round_to_half(value)), magnitude = bits & 0x7fffffff;
    uint32_t tiny = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
    uint32_t normal = (magnitude - 0x38000000) >> 13;
    uint32_t half = magnitude < 0x38800000 ? tiny : normal < 0x7c00 ? normal : 0x7c00;
    return (uint16_t)(half | (bits >> 16 & 0x8000));
}

/* out[i] = the nearest of its type, ties to even; NaN is not kept. */
EACH_CPU void phiship_narrow(const float *values, size_t count, int dtype, void *out) {
    uint16_t *narrow = out;
    if (dtype == BF16)
        for (size_t i = 0; i < count; i++) narrow[i] = float_to_bf16(values[i]);
    else if (dtype == F16)
        for (size_t i = 0; i < count; i++) narrow[i] = float_to_half(values[i]);
    else
        memcpy(out, values, count * sizeof(float));
}

INLINE size_t item_bytes(int dtype) { return dtype == F32 ? 4 : 2; }

/* Asks for what will be read a little later than `size` bytes from here. */
INLINE void prefetch(const char *here, size_t size) {
#ifdef __GNUC__
    for (size_t i = 0; i < size; i += 64) __builtin_prefetch(here + AHEAD + i);
#else
    (void)here, (void)size;
#endif
}

INLINE size_t least_of(size_t one, size_t other) { return one < other ? one : other; }

/* Least and greatest of `count` floats, by their bits, which are in the order of the magnitudes:
   those of negative floats are flipped. */
#define DEFINE_FIND_RANGE(name, type, magnitude)                                                  \
    INLINE type name##_flip(type bits) { return (type)(bits ^ (bits < 0 ? magnitude : 0)); }      \
    INLINE void name(const type *values, size_t count, type *low, type *high) {                   \
        type least = magnitude, most = (type)~magnitude;                                          \
        for (size_t i = 0; i < count; i++) {                                                      \
            type key = name##_flip(values[i]);                                                    \
            least = key < least ? key : least;                                                    \
            most = key > most ? key : most;                                                       \
        }                                                                                         \
        *low = name##_flip(least);                                                                \
        *high = name##_flip(most);                                                                \
    }
DEFINE_FIND_RANGE(find_range_16, int16_t, 0x7fff)
DEFINE_FIND_RANGE(find_range_32, int32_t, 0x7fffffff)

INLINE void widen(const void *raw, int dtype, int through_half, size_t first, size_t count,
                  float *out) {
    if (dtype == BF16) {
        const uint16_t *source = (const uint16_t *)raw + first;
        for (size_t i = 0; i < count; i++) out[i] = as_float((uint32_t)source[i] << 16);
    } else if (dtype == F16) {
        const uint16_t *source = (const uint16_t *)raw + first;
        for (size_t i = 0; i < count; i++) out[i] = half_to_float(source[i]);
    } else {
        memcpy(out, (const float *)raw + first, count * sizeof(float));
    }
    if (through_half && dtype != F16)
        for (size_t i = 0; i < count; i++) out[i] = round_to_half(out[i]);
}

/* low[g], high[g] = the least and greatest of `size` weights; returns whether all are finite. */
EACH_CPU int phiship_ranges(const void *raw, int dtype, size_t groups, size_t size, float *low,
                            float *high) {
    int32_t ends[2][CHUNK]; /* in the weights' type */
    size_t item = item_bytes(dtype);
    uint32_t is_infinite = 0;
    for (size_t start = 0; start < groups; start += CHUNK, low += CHUNK, high += CHUNK) {
        size_t present = least_of(CHUNK, groups - start);
        for (size_t i = 0; i < present; i++) {
            prefetch((const char *)raw + (start + i) * size * item, size * item);
            if (dtype == F32) {
                const int32_t *group = (const int32_t *)raw + (start + i) * size;
                WITH_KNOWN_COUNT(size, find_range_32(group, n, ends[0] + i, ends[1] + i))
            } else {
                const int16_t *group = (const int16_t *)raw + (start + i) * size;
                int16_t *least = (int16_t *)ends[0] + i, *most = (int16_t *)ends[1] + i;
                WITH_KNOWN_COUNT(size, find_range_16(group, n, least, most))
            }
        }
        widen(ends[0], dtype, 0, 0, present, low);
        widen(ends[1], dtype, 0, 0, present, high);
        for (size_t i = 0; i < present; i++) {
            is_infinite |= !isfinite(low[i]) | !isfinite(high[i]);
            low[i] += 0; /* -0 becomes 0: groups of zeros are alike */
            high[i] += 0;
        }
    }
    return !is_infinite;
}

/* Widens 2 * count weights to those whose codes are in the low halves of `count` bytes, and those
   in the high halves. */
INLINE void split(const void *raw, int dtype, int through_half, int layout, size_t first,
                  size_t count, float *low, float *high) {
    if (layout == HALVES) {
        for (size_t i = 0; i < count; i += 16) {
            widen(raw, dtype, through_half, first + 2 * i, 16, low + i);
            widen(raw, dtype, through_half, first + 2 * i + 16, 16, high + i);
        }
    } else if (dtype == BF16 && !through_half) {
        const char *source = (const char *)((const uint16_t *)raw + first);
        for (size_t i = 0; i < count; i++) {
            uint32_t pair;
            memcpy(&pair, source + 4 * i, 4);
            low[i] = as_float(pair << 16);
            high[i] = as_float(pair & 0xffff0000);
        }
    } else {
        float values[CHUNK];
        widen(raw, dtype, through_half, first, 2 * count, values);
        for (size_t i = 0; i < count; i++) low[i] = values[2 * i], high[i] = values[2 * i + 1];
    }
}

INLINE float clip(float value, float top) {
    value = value > 0 ? value : 0;
    return value < top ? value : top;
}

/* The nearest whole number in the lowest byte, ties to even: from 2^23 on floats have no fraction. */
INLINE uint32_t round_code(float value) { return as_bits(value + 0x1p23f); }

/* Whether `divide` is right and fast. */
INLINE int has_reciprocal(float value) {
    return HAS_FMA && fabsf(value) > 0x1p-100f && fabsf(value) < 0x1p100f;
}

/* x / y as division rounds it, wherever that decides a code; why: docs/decisions/0003. */
INLINE float divide(float x, float y, float reciprocal) {
    float quotient = x * reciprocal;
    return fmaf(fmaf(-quotient, y, x), reciprocal, quotient);
}

/* A code in the lowest byte. */
INLINE uint32_t find_code(float weight, int rule, float first, float second, float top) {
    switch (rule) {
    case MULTIPLY_ADD_TRUNCATE: return (uint32_t)(int32_t)clip(weight * first + second, top);
    case SUBTRACT_DIVIDE_ROUND: return round_code(clip((weight - first) / second, top));
    case BY_RECIPROCAL: return round_code(clip(divide(weight - first, second, 1 / second), top));
    default: return round_code(clip(weight / first + second, top));
    }
}

/* Codes of one group; with `high` two codes of 4 bits in each. */
INLINE void find_codes_by(int rule, const float *low, const float *high, size_t count, float first,
                          float second, float top, uint32_t *codes) {
    if (high)
        for (size_t i = 0; i < count; i++)
            codes[i] = find_code(low[i], rule, first, second, top) +
                       (find_code(high[i], rule, first, second, top) << 4);
    else
        for (size_t i = 0; i < count; i++) codes[i] = find_code(low[i], rule, first, second, top);
}

INLINE void find_codes(int rule, const float *low, const float *high, size_t count, float first,
                       float second, float top, uint32_t *codes) {
    if (rule == MULTIPLY_ADD_TRUNCATE)
        find_codes_by(MULTIPLY_ADD_TRUNCATE, low, high, count, first, second, top, codes);
    else if (rule == DIVIDE_ADD_ROUND)
        find_codes_by(DIVIDE_ADD_ROUND, low, high, count, first, second, top, codes);
    else if (has_reciprocal(second))
        find_codes_by(BY_RECIPROCAL, low, high, count, first, second, top, codes);
    else
        find_codes_by(SUBTRACT_DIVIDE_ROUND, low, high, count, first, second, top, codes);
}

/* One stream of bits, the first code lowest; count * bits is a multiple of 8. */
INLINE void pack(const uint32_t *codes, size_t count, int bits, uint8_t *out) {
    for (size_t i = 0; i < count; i += 8, out += bits) {
        uint64_t word = 0;
        for (int j = 0; j < 8; j++) word |= (uint64_t)(codes[i + j] & 0xff) << (j * bits);
        for (int j = 0; j < bits; j++) out[j] = (uint8_t)(word >> (8 * j));
    }
}

/* A step is as many whole groups as CHUNK holds, or, of a longer group, one part after another. */
INLINE size_t groups_of_step(size_t size) { return size < CHUNK ? CHUNK / size : 1; }

/* Codes 0 .. 2^bits - 1 of every group by `rule` with first[g] and second[g], packed.

   STREAM: one stream of bits, the first code lowest; a step's codes fill whole bytes.
   HALVES: 4 bits; byte j of every 32 codes holds code j below code j + 16, as ggml has them.
   SIGNED: 4 bits; as STREAM, codes less 8 in two's complement. */
EACH_CPU void phiship_encode(const void *raw, int dtype, int through_half, size_t groups,
                             size_t size, int bits, int rule, int layout, const float *first,
                             const float *second, uint8_t *packed) {
    float values[CHUNK], top = (float)((1 << bits) - 1);
    float *high = bits == 4 ? values + CHUNK / 2 : NULL;
    uint32_t codes[CHUNK];
    uint32_t flip = layout == SIGNED ? 0x88 : 0;
    size_t weights_each = high ? 2 : 1; /* that make one element of `codes` */
    for (size_t group = 0, step = groups_of_step(size); group < groups; group += step)
        for (size_t part = 0; part < size; part += CHUNK) {
            size_t start = group * size + part, present = least_of(step, groups - group);
            size_t count = least_of(size - part, CHUNK) / weights_each, all = present * count;
            if (high)
                split(raw, dtype, through_half, layout, start, all, values, high);
            else
                widen(raw, dtype, through_half, start, all, values);
            for (size_t at = 0, g = group; at < all; at += count, g++)
                WITH_KNOWN_COUNT(count, find_codes(rule, values + at, high ? high + at : NULL, n,
                                                   first[g], second[g], top, codes + at))
            if (high || bits == 8)
                for (size_t i = 0; i < all; i++) packed[i] = (uint8_t)(codes[i] ^ flip);
            else
                pack(codes, all, bits, packed);
            packed += all * weights_each * (size_t)bits / 8;
        }
}

/* Steps and origins of groups from their ranges, as in mlx.py and nncf.py; returns whether the steps
   can be stored. */
INLINE int find_mlx_grid(const float *low, const float *high, size_t groups, int bits, float *steps,
                         float *origins) {
    uint32_t is_infinite = 0;
    float top = (float)((1 << bits) - 1);
    for (size_t g = 0; g < groups; g++) {
        float step = (high[g] - low[g]) / top;
        is_infinite |= !isfinite(step);
        int is_low = fabsf(low[g]) > fabsf(high[g]);
        float edge = is_low ? low[g] : high[g];
        step = step > MLX_LEAST_STEP ? step : MLX_LEAST_STEP;
        step = is_low ? step : -step;
        float count = rintf(edge / step);
        steps[g] = count != 0 ? edge / count : step;
        origins[g] = count != 0 ? edge : 0;
    }
    return !is_infinite;
}

INLINE int find_nncf_grid(const float *low, const float *high, size_t groups, int bits,
                          float *steps, float *origins) {
    uint32_t is_beyond_half = 0;
    float middle = (float)(1 << (bits - 1));
    for (size_t g = 0; g < groups; g++) {
        float extreme = -low[g] >= high[g] ? low[g] : high[g];
        float step = extreme / -middle;
        steps[g] = fabsf(step) < NNCF_LEAST_STEP ? NNCF_LEAST_STEP : step;
        origins[g] = steps[g] * -middle;
        is_beyond_half |= fabsf(step) >= 65520;
    }
    return !is_beyond_half;
}

/* Ranges, grid and codes, block by block, so that the weights come from memory once. Steps and,
   where `second` is not NULL, origins are stored as `stored`. */
EACH_CPU int phiship_quantize(const void *raw, int dtype, size_t groups, size_t size, int bits,
                              int grid, int layout, int stored, char *first, char *second,
                              uint8_t *packed) {
    float low[CHUNK], high[CHUNK], steps[CHUNK], origins[CHUNK];
    size_t most = BLOCK / size < 1 ? 1 : least_of(BLOCK / size, CHUNK);
    const char *block = raw;
    for (size_t start = 0, count; start < groups; start += count) {
        count = least_of(most, groups - start);
        if (!phiship_ranges(block, dtype, count, size, low, high)) return NOT_FINITE;
        if (!(grid == MLX ? find_mlx_grid(low, high, count, bits, steps, origins)
                          : find_nncf_grid(low, high, count, bits, steps, origins)))
            return TOO_LARGE;
        phiship_narrow(steps, count, stored, first + start * item_bytes(stored));
        if (second) phiship_narrow(origins, count, stored, second + start * item_bytes(stored));
        phiship_encode(block, dtype, 0, count, size, bits, SUBTRACT_DIVIDE_ROUND, layout, origins,
                       steps, packed);
        block += count * size * item_bytes(dtype);
        packed += count * size * (size_t)bits / 8;
    }
    return DONE;
}
