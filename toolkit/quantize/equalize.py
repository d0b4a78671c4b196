"""Channel scales that leave a model as it is and make its weights easier to quantize.

Multiplying a column of a matrix and dividing what feeds it changes nothing in exact arithmetic.
Columns whose inputs are large get finer steps that way (AWQ, Lin et al. 2023): their scale is
mean |x| ** power, and of some powers the one is taken whose rounded weights give the least error
of the outputs on the calibration text.
"""

import numpy as np

from toolkit.quantize.grids import GridEncoder, decode, nearest
from toolkit.quantize.kernels import Floats

POWERS = np.arange(0, 1.01, 0.1)
LEAST_MEAN = 1e-5  # of |x|, relative to the largest: dead channels are not blown up


def find_stretch(
    weights: Floats, encoder: GridEncoder, inputs: Floats, magnitudes: Floats
) -> Floats:
    """Return the factor of each column, float32 [columns].

    weights: some rows [rows, columns] of the matrix, inputs: some of its inputs [n, columns].
    magnitudes: the mean |x| of each column; columns that share a scale have equal ones.
    """
    errors = []
    for power in POWERS:
        stretch = _scale(magnitudes, power)
        stretched = weights * stretch
        grid = encoder.fit(stretched)
        off = decode(nearest(stretched, grid, encoder.bits), grid) / stretch - weights
        errors.append(float(np.square(off @ inputs.T).sum(dtype=np.float64)))
    return _scale(magnitudes, POWERS[int(np.argmin(errors))])


def make_foldable(stretch: Floats, norm: Floats) -> tuple[Floats, Floats]:
    """Return (stretch, norm / stretch) such that the latter is exact in bf16, in all formats.

    The scale takes what rounding the norm's weight would lose. A weight of zero keeps its column.
    """
    bits = (norm / stretch).view(np.uint32)
    folded = ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    is_kept = (folded == 0) | ~np.isfinite(folded)
    folded = np.where(is_kept, norm, folded)
    exact = np.divide(norm, folded, out=np.ones_like(norm), where=~is_kept)
    return exact, folded


def _scale(magnitudes: Floats, power: float) -> Floats:
    """Around 1 on a logarithmic scale."""
    least = max(LEAST_MEAN * float(magnitudes.max(initial=0)), float(np.finfo(np.float32).tiny))
    scale: Floats = np.maximum(magnitudes, np.float32(least)) ** np.float32(power)
    scale /= np.sqrt(scale.max() * scale.min())
    return scale
