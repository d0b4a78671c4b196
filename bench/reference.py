"""Time and memory of the float32 reference: python -m bench.reference CHECKPOINT TOKENS [LENGTH]

TOKENS random ids in sequences of LENGTH (512) go through the layers, nothing is taken from the
cache; then the logits after every one of them are computed, in pieces, as `phiship check` does.
"""

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from toolkit.checkpoint import Checkpoint
from toolkit.console import Console
from toolkit.families import read_decoder
from toolkit.quality.comparing import LOGIT_ROWS, Sequences, Source, read_source


def measure(folder: Path, sequences: Sequences) -> Source:
    """Have the source read the sequences, with a cache that is empty and goes."""
    checkpoint = Checkpoint.open(folder)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        return read_source(checkpoint, read_decoder(checkpoint.config), sequences, Console())


def main() -> None:
    """Print wall seconds of states and of logits, CPU seconds, the peak of resident memory."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    length = min(count, int(sys.argv[3]) if len(sys.argv) > 3 else 512)
    shape = (count // length, length)
    vocab = read_decoder(Checkpoint.open(folder).config).vocab
    sequences = np.random.default_rng(0).integers(0, vocab, shape).tolist()
    started_s = time.monotonic()
    source = measure(folder, sequences)
    states_s = time.monotonic() - started_s
    for text in range(len(sequences)):
        for start in range(0, length, LOGIT_ROWS):
            source.logits(text, slice(start, start + LOGIT_ROWS))
    total_s = time.monotonic() - started_s
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        f"{shape[0]} x {length} tokens: states {states_s:.0f} s, "
        f"logits {total_s - states_s:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of CPU, "
        f"{used.ru_maxrss / 1000:.0f} MB"
    )


if __name__ == "__main__":
    main()
