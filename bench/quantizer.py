"""Rate of the block kernels on one core, compiled and NumPy: python -m bench.quantizer"""

import time

import numpy as np

from toolkit.quantize import kernels
from toolkit.quantize.kernels import Rule, encode, find_ranges

WEIGHTS = 1 << 23
ROUNDS = 7


def main() -> None:
    """Print M weights per second of CPU, the best of several rounds, for bf16 weights."""
    random = np.random.default_rng(0)
    raw = (random.standard_normal(WEIGHTS).astype(np.float32).view(np.uint32) >> 16).astype("<u2")
    for name, load in (("compiled", kernels.load_library), ("NumPy", lambda: None)):
        kernels.load_library = load
        if name == "compiled" and load() is None:
            print("compiled: not there (built without a C compiler)")
            continue
        for bits, size in ((4, 32), (4, 128), (8, 4096)):
            best_s = min(_time(raw, bits, size) for _ in range(ROUNDS))
            print(
                f"{name}, {bits} bits, groups of {size}: {WEIGHTS / best_s / 1e6:.0f} M weights/s"
            )


def _time(raw, bits: int, size: int) -> float:  # type: ignore[no-untyped-def]
    codes = np.empty(WEIGHTS * bits // 8, np.uint8)
    started_s = time.process_time()
    low, high = find_ranges(raw, size)
    encode(raw, size, codes, bits, Rule.MULTIPLY_ADD_TRUNCATE, low, high)
    return time.process_time() - started_s


if __name__ == "__main__":
    main()
