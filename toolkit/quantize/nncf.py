"""Groups of 4 or 8 bits, bit-exact with NNCF (OpenVINO); value = (code - zero point) * scale.

symmetric    4 bits; the signed weight of largest magnitude becomes -8: scale = extreme / -8; of two
             opposite extremes the negative one counts. Codes are two's complement.
asymmetric   4 or 8 bits; scale = (max - min) / (2^bits - 1), zero point rounded.

Scales are computed and used in float32 and stored in float16, as NNCF does. NNCF clips a group
whose weights all have the same sign; here its range is widened to hold 0.

Source: nncf/openvino/optimized_functions/models.py (integer quantization).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.quantize import kernels
from toolkit.quantize.extremes import scale_extremes
from toolkit.quantize.kernels import (
    Codes,
    Fit,
    Floats,
    Layout,
    Rule,
    encode,
    find_ranges,
    narrow,
    quantize_groups,
)

BEYOND_HALF = 65520.0  # from here on float16 is infinite
TOO_LARGE = "a group's weights are too large for a float16 scale"
LEAST_SCALE = np.finfo(np.float32).eps  # NNCF's, for groups of zeros


def quantize_symmetric(
    raw: NDArray[Any], size: int, codes: Codes, scales: NDArray[np.float16]
) -> None:
    """Quantize raw (bf16 bits, float16 or float32), a flat run of whole groups, to 4 bits.

    codes [len / 2] (two a byte, the first in the low half), scales [groups]. ValueError when a
    weight is not finite, or too large for a float16 scale.
    """
    # Codes are rint((weight + 8 * scale) / scale), for weight / scale + 8, with one rounding less:
    # the sum is exact for bf16 and float16 wherever it decides a code.
    if kernels.load_library():
        if not quantize_groups(raw, size, codes, 4, Fit.NNCF, Layout.SIGNED, scales, None):
            raise ValueError(TOO_LARGE)
        return
    exact = fit_symmetric(raw, size, scales)
    rule, origins = Rule.SUBTRACT_DIVIDE_ROUND, exact * np.float32(-8)
    encode(raw, size, codes, 4, rule, origins, exact, layout=Layout.SIGNED)


def fit_symmetric(raw: NDArray[Any], size: int, scales: NDArray[np.float16]) -> Floats:
    """Fill scales as in `quantize_symmetric`; returns them before they are rounded."""
    low, high = find_ranges(raw, size)
    exact = _at_least(scale_extremes(low, high, 1 / 8))
    _store(exact, scales)
    return exact


def quantize_asymmetric(
    raw: NDArray[Any], bits: int, size: int, codes: Codes, scales: NDArray[np.float16],
    zero_points: Codes,
) -> None:  # fmt: skip
    """As quantize_symmetric, in `bits` 4 or 8; zero_points [groups], one a byte."""
    exact = fit_asymmetric(raw, bits, size, scales, zero_points)
    encode(raw, size, codes, bits, Rule.DIVIDE_ADD_ROUND, exact, zero_points.astype(np.float32))


def fit_asymmetric(
    raw: NDArray[Any], bits: int, size: int, scales: NDArray[np.float16], zero_points: Codes
) -> Floats:
    """Fill scales and zero points; returns the scales before they are rounded."""
    low, high = find_ranges(raw, size)
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    top = (1 << bits) - 1
    with np.errstate(over="ignore"):
        exact = _at_least((high - low) / np.float32(top))
    _store(exact, scales)
    zero_points[:] = np.clip(-np.rint(low / exact), 0, top)
    return exact


def _at_least(scales: Floats) -> Floats:
    """Scales with those too near to 0 replaced."""
    tiny = np.abs(scales) < LEAST_SCALE
    return np.where(tiny, LEAST_SCALE, scales) if tiny.any() else scales


def _store(exact: Floats, scales: NDArray[np.float16]) -> None:
    if np.abs(exact).max(initial=0) >= BEYOND_HALF:
        raise ValueError(TOO_LARGE)
    narrow(exact, scales)
