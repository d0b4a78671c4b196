"""Prove that codes by a reciprocal are those of a true division: python -m bench.division

The compiled kernel divides by a group's step in three operations: a product with the reciprocal,
what that leaves, and its share (docs/decisions/0003). The result is the true quotient or the float
beside it, so that a code can differ only where the quotient is within three floats of a half. Here
is every such weight for every step from 1 to 2, a few minutes; other steps are these
times a power of two.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from toolkit.quantize.kernels import Rule, encode, load_library

STEPS = 1 << 23
PART = 1 << 10
HALVES = (np.arange(256) + 0.5).astype(np.float32)
NEAR = np.arange(-3, 4, dtype=np.int32).astype(np.uint32)


def main() -> None:
    """Exit with the number of weights whose code differs."""
    if load_library() is None:
        sys.exit("not compiled: install a C compiler and run make setup")
    with ThreadPoolExecutor(2) as pool:
        different = sum(pool.map(count_different, range(0, STEPS, PART)))
    print(f"{STEPS * HALVES.size * NEAR.size} weights, {different} of them with another code")
    sys.exit(different > 0)


def count_different(first: int) -> int:
    """Of all weights near a half code, for PART steps."""
    steps = (np.arange(first, first + PART, dtype=np.uint32) | 0x3F800000).view(np.float32)
    middles = HALVES * steps[:, None]
    weights = (middles.view(np.uint32)[..., None] + NEAR).reshape(PART, -1).view(np.float32)
    codes = np.empty(weights.size, np.uint8)
    rule, origins = Rule.SUBTRACT_DIVIDE_ROUND, np.zeros_like(steps)
    encode(weights, weights.shape[1], codes, 8, rule, origins, steps)
    expected = np.rint(weights / steps[:, None]).clip(0, 255).astype(np.uint8)
    return int((codes.reshape(expected.shape) != expected).sum())


if __name__ == "__main__":
    main()
