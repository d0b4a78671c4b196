"""Groups of 2 to 8 bits, bit-exact with mlx.core.quantize; value = code * scale + bias.

The end of a group's range that is farther from 0 becomes a code without error, and 0 another one:
its distance from 0 is made a whole number of steps, and it is the bias.

Source: the affine quantizer of MLX, mlx/backend/cpu/quantized.cpp (MLX 0.32).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.quantize import kernels
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

LEAST_STEP = np.float32(1e-7)
TOO_FAR_APART = "a group's weights lie too far apart for a float32 scale"


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
    if kernels.load_library():
        rule, layout = Fit.MLX, Layout.STREAM
        if not quantize_groups(raw, group_size, codes, bits, rule, layout, scales, biases):
            raise ValueError(TOO_FAR_APART)
        return
    steps, origins = fit(raw, bits, group_size, scales, biases)
    encode(raw, group_size, codes, bits, Rule.SUBTRACT_DIVIDE_ROUND, origins, steps)


def fit(
    raw: NDArray[Any], bits: int, group_size: int, scales: NDArray[Any], biases: NDArray[Any]
) -> tuple[Floats, Floats]:
    """Fill scales and biases as in `quantize`; returns both before they are rounded."""
    low, high = find_ranges(raw, group_size)
    steps, origins = _find_grid(low, high, (1 << bits) - 1)
    if not np.isfinite(steps).all():
        raise ValueError(TOO_FAR_APART)
    narrow(steps, scales)
    narrow(origins, biases)
    return steps, origins


def _find_grid(low: Floats, high: Floats, top: int) -> tuple[Floats, Floats]:
    """Step and origin of each group, float32, from its least and greatest weight."""
    is_low = np.abs(low) > np.abs(high)
    edges = np.where(is_low, low, high)
    with np.errstate(over="ignore", invalid="ignore"):
        widths = np.maximum((high - low) / np.float32(top), LEAST_STEP)
        steps = np.where(is_low, widths, -widths)
        counts = np.rint(edges / steps)
    has_edge = (counts != 0) & np.isfinite(widths)
    np.divide(edges, counts, out=steps, where=has_edge)
    return steps, np.where(has_edge, edges, np.float32(0))
