"""What moe_logits.npz holds: lengths, and how far from chance its routings are."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN = Path(__file__).with_name("moe_logits.npz")
SEED = 8
CASES = (1, 64, 65, 128)  # LongRoPE switches after 64 tokens
LEAST_GAP = 1e-4  # of logits that spread by 1.5; two float32 passes differ by 1e-5 there
BAND = 0.02  # 2 x router_jitter_noise


def smallest_gap(logits: NDArray[Any]) -> float:
    """How near a router's logits [n, experts] come to another choice, for any token."""
    best = -np.sort(-logits.astype(np.float64), axis=1)[:, :3]
    gaps = [np.abs(np.diff(best, axis=1)).min()]
    for place in range(2):
        top = best[:, place : place + 1]
        scale = np.maximum(np.abs(logits), top)
        gaps.append((np.abs((top - logits) / scale - BAND) * np.abs(scale)).min())
    return float(min(gaps))
