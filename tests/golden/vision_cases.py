"""What vision.npz holds: the tower's input, a picture to be made small, what is kept of each."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN = Path(__file__).with_name("vision.npz")


def tower_input() -> NDArray[np.float32]:
    """Seeded crops: float32 [2, 3, 336, 336]."""
    return np.random.default_rng(3).standard_normal((2, 3, 336, 336), np.float32)


def wide_picture() -> NDArray[np.float32]:
    """A seeded normalized picture of 3 x 4 crops, an odd and an even scale: [3, 1008, 1344]."""
    return np.random.default_rng(4).standard_normal((3, 1008, 1344), np.float32)


def select(features: NDArray[Any]) -> NDArray[Any]:
    """Every 19th patch and every 5th column: enough to see any error, and a small file."""
    return features[:, ::19, ::5]
