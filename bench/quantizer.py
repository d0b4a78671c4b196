"""Rate of the block quantizer on one core: python -m bench.quantizer"""

import time

import numpy as np

from toolkit.quantize.blockwise import BlockQuantizer

WEIGHTS = 1 << 23
ROUNDS = 7


def main() -> None:
    """Print M weights per second of CPU, the best of several rounds, for bf16 weights."""
    random = np.random.default_rng(0)
    raw = (random.standard_normal(WEIGHTS).astype(np.float32).view(np.uint32) >> 16).astype("<u2")
    for symmetric in (True, False):
        quantizer = BlockQuantizer(4, 32, symmetric)
        codes, scales = np.empty(WEIGHTS // 2, np.uint8), np.empty(WEIGHTS // 32, np.float32)
        points = None if symmetric else np.empty(WEIGHTS // 32, np.uint8)
        best_s = min(_time(quantizer, raw, codes, scales, points) for _ in range(ROUNDS))
        kind = "symmetric" if symmetric else "asymmetric"
        print(f"int4 block 32 {kind}: {WEIGHTS / best_s / 1e6:.0f} M weights/s")


def _time(quantizer: BlockQuantizer, *arrays) -> float:  # type: ignore[no-untyped-def]
    started_s = time.process_time()
    quantizer.quantize(*arrays)
    return time.process_time() - started_s


if __name__ == "__main__":
    main()
