/* The two loops that see every weight: the range of each group, and its codes.

   What is per group (scales, zero points) is computed between them in Python, so this file knows no
   format. kernels.py calls it through ctypes, and has the same two functions in NumPy for machines
   without a compiler; tests hold both equal bit for bit.

   Build with -ffp-contract=off: a fused multiply-add would round once where the formats round twice.
   Plain C99, no Python headers. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif

enum { BF16, F16, F32 };
enum { MULTIPLY_ADD_TRUNCATE, SUBTRACT_DIVIDE_ROUND, DIVIDE_ADD_ROUND };
enum { STREAM, HALVES };

#define CHUNK 512 /* weights at a time; they and their codes stay in the first-level cache */

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

static inline __attribute__((always_inline)) void widen(
    const void *raw, int dtype, int through_half, size_t first, size_t count, float *out) {
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

/* Order of floats as order of integers, and back; its own inverse. */
static inline int32_t order(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

static inline __attribute__((always_inline)) void find_range(
    const float *values, size_t count, int32_t *least, int32_t *most) {
    for (size_t i = 0; i < count; i++) {
        int32_t key = order((int32_t)as_bits(values[i]));
        *least = key < *least ? key : *least;
        *most = key > *most ? key : *most;
    }
}

static inline __attribute__((always_inline)) void find_codes(
    float *values, size_t count, int rule, float first, float second, float top, uint8_t *codes) {
    if (rule == MULTIPLY_ADD_TRUNCATE)
        for (size_t i = 0; i < count; i++) values[i] = values[i] * first + second;
    else if (rule == SUBTRACT_DIVIDE_ROUND)
        for (size_t i = 0; i < count; i++) values[i] = rintf((values[i] - first) / second);
    else
        for (size_t i = 0; i < count; i++) values[i] = rintf(values[i] / first + second);
    for (size_t i = 0; i < count; i++) {
        float value = values[i] > 0 ? values[i] : 0;
        codes[i] = (uint8_t)(int32_t)(value < top ? value : top);
    }
}

/* Calls with a count the compiler knows: whole groups of 32 then need no loop. */
#define WITH_KNOWN_COUNT(count, call) \
    switch (count) {                  \
    case 16: { enum { n = 16 }; call; break; } \
    case 32: { enum { n = 32 }; call; break; } \
    case 64: { enum { n = 64 }; call; break; } \
    default: { size_t n = count; call; } \
    }

/* STREAM: codes as one stream of bits, the first code lowest; count * bits is a multiple of 8.
   HALVES: 4 bits; byte j of every 32 codes holds code j below code j + 16, as ggml has them. */
static inline __attribute__((always_inline)) void pack(
    const uint8_t *codes, size_t count, int bits, int layout, uint8_t *out) {
    if (layout == HALVES) {
        for (size_t i = 0; i < count; i += 32, out += 16)
            for (int j = 0; j < 16; j++) out[j] = (uint8_t)(codes[i + j] | codes[i + j + 16] << 4);
    } else if (bits == 8) {
        memcpy(out, codes, count);
    } else if (bits == 4) {
        for (size_t i = 0; i < count / 2; i++)
            out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
    } else {
        for (size_t i = 0; i < count; i += 8, out += bits) {
            uint64_t word = 0;
            for (int j = 0; j < 8; j++) word |= (uint64_t)codes[i + j] << (j * bits);
            for (int j = 0; j < bits; j++) out[j] = (uint8_t)(word >> (8 * j));
        }
    }
}

/* A step is as many whole groups as CHUNK holds, or, of a longer group, one part after another. */
static inline size_t groups_of_step(size_t size) { return size < CHUNK ? CHUNK / size : 1; }

static inline size_t least_of(size_t one, size_t other) { return one < other ? one : other; }

/* low[g], high[g] = the least and greatest of `size` weights; not finite when one of them is not. */
EACH_CPU void phiship_ranges(const void *raw, int dtype, int through_half, size_t groups,
                             size_t size, float *low, float *high) {
    float values[CHUNK];
    int32_t least = 0, most = 0;
    for (size_t group = 0, step = groups_of_step(size); group < groups; group += step)
        for (size_t part = 0; part < size; part += CHUNK) {
            size_t count = least_of(size - part, CHUNK), present = least_of(step, groups - group);
            widen(raw, dtype, through_half, group * size + part, present * count, values);
            for (size_t i = 0; i < present; i++) {
                if (part == 0) least = INT32_MAX, most = INT32_MIN;
                WITH_KNOWN_COUNT(count, find_range(values + i * count, n, &least, &most))
                low[group + i] = as_float((uint32_t)order(least));
                high[group + i] = as_float((uint32_t)order(most));
            }
        }
}

/* Codes 0 .. 2^bits - 1 of every group by `rule` with first[g] and second[g], packed. */
EACH_CPU void phiship_encode(const void *raw, int dtype, int through_half, size_t groups,
                             size_t size, int bits, int rule, int layout, const float *first,
                             const float *second, uint8_t *packed) {
    float values[CHUNK], top = (float)((1 << bits) - 1);
    uint8_t codes[CHUNK];
    for (size_t group = 0, step = groups_of_step(size); group < groups; group += step)
        for (size_t part = 0; part < size; part += CHUNK) {
            size_t count = least_of(size - part, CHUNK), present = least_of(step, groups - group);
            widen(raw, dtype, through_half, group * size + part, present * count, values);
            for (size_t i = 0, g = group; i < present; i++, g++)
                WITH_KNOWN_COUNT(count, find_codes(values + i * count, n, rule, first[g],
                                                   second[g], top, codes + i * count))
            pack(codes, present * count, bits, layout, packed);
            packed += present * count * (size_t)bits / 8;
        }
}
