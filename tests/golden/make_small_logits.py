"""Make small_logits.npz: what small_forward.py, float64 and position by position, computes.

python -m tests.golden.make_small_logits
"""

import tempfile
from pathlib import Path

import numpy as np

from tests.golden import small_forward
from tests.golden.cases import case_ids, select
from tests.golden.small_cases import CASES, GOLDEN, SEED
from tests.small_checkpoints import write_small_checkpoint


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as work:
        for variant, lengths in CASES.items():
            folder = write_small_checkpoint(Path(work) / variant, variant, seed=SEED)
            for length in lengths:
                logits = small_forward.forward(folder, case_ids(folder, length))
                found[f"{variant}-{length}"] = select(logits).astype(np.float32)
    np.savez_compressed(GOLDEN, **found)


if __name__ == "__main__":
    main()
