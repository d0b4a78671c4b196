"""Groups of 2 to 8 bits, bit-exact with mlx.core.quantize; value = code * scale + bias.

The end of a group's range that is farther from 0 becomes a code without error, and 0 another one:
its distance from 0 is made a whole number of steps, and it is the bias.

Source: the affine quantizer of MLX, mlx/backend/cpu/quantized.cpp (MLX 0.32).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.quantize.kernels import Codes, Floats, Rule, encode, find_ranges

LEAST_STEP = np.float32(1e-7)


def quantize(
    raw: NDArray[Any],
    bits: int,
    group_size: int,
    codes: Codes,
    scales: NDArray[Any],
    biases: NDArray[Any],
) -> None:
    """Quantize raw (bf16 bits, float16 or float32), a flat run of whole groups.

    codes [len * bits / 8], one little-endian stream of bits; scales and biases [groups] in raw's
    type, bf16 as its bits. Codes belong to the scales before these are rounded to that type.
    ValueError when a weight is not finite, or a group's range is not.
    """
    low, high = find_ranges(raw, group_size)
    steps, origins = find_grid(low, high, (1 << bits) - 1)
    narrow(steps, scales)
    narrow(origins, biases)
    encode(raw, group_size, codes, bits, Rule.SUBTRACT_DIVIDE_ROUND, origins, steps)


def find_grid(low: Floats, high: Floats, top: int) -> tuple[Floats, Floats]:
    """Step and origin of each group, float32, from its least and greatest weight."""
    with np.errstate(over="ignore"):
        steps = (high - low) / np.float32(top)
    if not np.isfinite(steps).all():
        raise ValueError("a group's weights lie too far apart for a float32 scale")
    # Signs by arithmetic: choosing by elements costs more than the kernels.
    sums = low + high  # negative where |low| > |high|, and where both are the same negative weight
    edges = np.copysign(np.maximum(-low, high), sums)
    is_low = np.abs(low) > np.abs(high)
    np.maximum(steps, LEAST_STEP, out=steps)
    steps *= is_low.astype(np.float32) * 2 - 1
    counts = np.rint(edges / steps)
    if counts.all():
        return np.divide(edges, counts, out=steps), edges
    has_edge = counts != 0
    np.divide(edges, counts, out=steps, where=has_edge)
    return steps, np.where(has_edge, edges, np.float32(0))


def narrow(values: Floats, out: NDArray[Any]) -> None:
    """Round float32 to nearest even into `out`: float32, float16, or bf16 as uint16 bits.

    NaN is not kept in bf16.
    """
    if out.dtype != np.uint16:
        out[:] = values
        return
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    out[:] = rounded
