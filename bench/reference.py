"""Time and memory of the float32 reference: python -m bench.reference CHECKPOINT TOKENS"""

import resource
import sys
import time
from pathlib import Path

import numpy as np

from toolkit.checkpoint import Checkpoint
from toolkit.families import read_decoder
from toolkit.quality.reference import forward


def main() -> None:
    """Print wall seconds and peak resident memory of one forward pass over random ids."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    checkpoint = Checkpoint.open(folder)
    decoder = read_decoder(checkpoint.config)
    ids = np.random.default_rng(0).integers(0, decoder.vocab, count).tolist()
    started_s = time.monotonic()
    forward(checkpoint, decoder, ids)
    wall_s = time.monotonic() - started_s
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(f"{count} tokens: {wall_s:.0f} s, {peak_mb:.0f} MB")


if __name__ == "__main__":
    main()
