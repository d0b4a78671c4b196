"""Blocks of 4 or 8 bits, bit-exact with MLAS (ONNX Runtime); value = (code - zero point) * scale.

symmetric    the signed weight of largest magnitude becomes code 0: scale = extreme / -2^(bits-1),
             zero point 2^(bits-1); of two opposite extremes the negative one counts.
asymmetric   scale = (max - min) / (2^bits - 1) with 0 inside [min, max], zero point rounded.

Source: MatMulNBits' quantizer in onnxruntime/core/mlas (BlockwiseQuantizer).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.quantize.extremes import scale_extremes
from toolkit.quantize.kernels import Codes, Floats, Rule, encode, find_ranges, pack


def quantize(
    raw: NDArray[Any],
    bits: int,
    block_size: int,
    codes: Codes,
    scales: NDArray[Any],
    zero_points: Codes | None,
) -> None:
    """Quantize raw (bf16 bits, float16 or float32), a flat run of whole blocks.

    codes [len * bits / 8] (two 4-bit codes a byte, the first in the low half), scales [blocks],
    float32 or float16, zero_points [blocks], one a byte, None when symmetric. With float16 scales
    the weights pass through float16 first, as the vendor's fp16 path has them. ValueError when a
    weight is not finite.
    """
    offsets = fit(raw, bits, block_size, scales, zero_points)
    rule, through_half = Rule.MULTIPLY_ADD_TRUNCATE, scales.dtype == np.float16
    reciprocals = invert(scales)
    encode(raw, block_size, codes, bits, rule, reciprocals, offsets, through_half=through_half)


def fit(
    raw: NDArray[Any], bits: int, block_size: int, scales: NDArray[Any], zero_points: Codes | None
) -> Floats:
    """Fill scales and zero points as in `quantize`; returns each block's zero point + 0.5."""
    low, high = find_ranges(raw, block_size, through_half=scales.dtype == np.float16)
    if zero_points is None:
        middle = 1 << (bits - 1)
        scales[:] = scale_extremes(low, high, 1 / middle)
        return np.full_like(low, middle + 0.5)
    zero_points[:] = _place_zero(low, high, (1 << bits) - 1, scales)
    offsets: Floats = zero_points + np.float32(0.5)
    return offsets


def invert(scales: NDArray[Any]) -> Floats:
    """1 / scale in float32; 0 where the scale is 0."""
    wide = scales.astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse: Floats = np.float32(1) / wide
    inverse[wide == 0] = 0
    return inverse


def pack_zero_points(zero_points: Codes, bits: int) -> Codes:
    """Pack [rows, blocks] to [rows, bytes]; a row of 4-bit ones ends on a whole byte."""
    if bits == 4 and zero_points.shape[1] % 2:
        zero_points = np.pad(zero_points, ((0, 0), (0, 1)))
    return pack(zero_points, bits).reshape(len(zero_points), -1)


def _place_zero(low: Floats, high: Floats, top: int, scales: NDArray[Any]) -> Floats:
    """Fill `scales` from the ranges, widened to hold 0; returns the zero points."""
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    with np.errstate(over="ignore"):
        exact = (high - low) / np.float32(top)
    if not np.isfinite(exact).all():
        raise ValueError("a block's weights lie too far apart for a float32 scale")
    scales[:] = exact
    points = np.divide(-low, exact, out=low.copy(), where=exact != 0)
    rounded: Floats = np.clip(np.floor(points + np.float32(0.5)), 0, top)
    return rounded
