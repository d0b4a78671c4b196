"""The weight of largest magnitude of each group, from its range."""

import numpy as np

from toolkit.quantize.kernels import Floats


def scale_extremes(low: Floats, high: Floats, factor: float) -> Floats:
    """The extremes, of two opposite ones the negative, times -`factor`, a power of two.

    By arithmetic on signs: choosing by elements takes longer than the kernels do for a group.
    """
    with np.errstate(over="ignore"):  # an infinite sum has the right sign
        opposite = -low - high
    scaled: Floats = np.maximum(-low, high) * np.float32(factor)
    np.copysign(scaled, opposite, out=scaled)
    return scaled
