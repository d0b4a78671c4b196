"""Q4_0: the bytes of ggml's quantize_row_q4_0_ref, faster.

A block of 32 weights has a scale d = extreme / -8 (float16), where `extreme` is the weight of
largest magnitude, the first of equal ones; code = trunc(weight / d + 8.5), at most 15, with two
roundings, as ggml has them where there is no fused multiply-add. Byte j of a block holds code j
below code j + 16.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint import to_float32
from toolkit.quantize.extremes import scale_extremes
from toolkit.quantize.kernels import Floats, Layout, Rule, encode, find_ranges, narrow

BLOCK_WEIGHTS = 32
BLOCK = np.dtype([("scale", "<f2"), ("codes", "u1", (16,))])
# Below this the inverse of a scale may be infinite, and ggml's code is undefined in C.
TINY = np.float32(2.0**-116)


def quantize(raw: NDArray[Any], encoded: NDArray[np.uint8], largest: float) -> bool:
    """Quantize whole blocks in C order (bf16 bits, float16, float32) to blocks of 18 bytes.

    False, and nothing done, where ggml itself must decide: a weight is not finite or beyond
    `largest`, or all weights of a block are tiny.
    """
    try:
        low, high = find_ranges(raw, BLOCK_WEIGHTS)
    except ValueError:
        return False
    magnitudes = np.maximum(-low, high)
    if magnitudes.max() > largest or ((magnitudes > 0) & (magnitudes < TINY)).any():
        return False
    scales = _choose_scales(raw, low, high)
    with np.errstate(divide="ignore"):
        inverses = np.float32(1) / scales
    inverses[scales == 0] = 0
    codes = np.empty((len(scales), 16), np.uint8)
    offsets = np.full_like(scales, 8.5)
    rule, layout = Rule.MULTIPLY_ADD_TRUNCATE, Layout.HALVES
    encode(raw, BLOCK_WEIGHTS, codes.reshape(-1), 4, rule, inverses, offsets, layout=layout)
    blocks = encoded.reshape(-1).view(BLOCK)
    narrow(scales, halves := np.empty(len(scales), np.float16))
    blocks["scale"], blocks["codes"] = halves, codes
    return True


def _choose_scales(raw: NDArray[Any], low: Floats, high: Floats) -> Floats:
    """The weight of largest magnitude of each block, of equal ones the first, by -8."""
    scales = scale_extremes(low, high, 1 / 8)
    ties = np.flatnonzero((-low == high) & (high > 0))
    rows = to_float32(raw.reshape(-1, BLOCK_WEIGHTS)[ties])
    extremes = rows[np.arange(ties.size), np.argmax(np.abs(rows), axis=1)]
    scales[ties] = extremes * np.float32(-1 / 8)
    return scales
