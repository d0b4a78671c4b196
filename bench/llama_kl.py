"""Our measures beside llama-perplexity's, on the tokens that it read: docs/quality.md.

python -m bench.llama_kl BASE.bin SOURCE_ARTIFACT ARTIFACT

BASE.bin is what `llama-perplexity --save-all-logits BASE.bin` wrote with the source's model.gguf.
Both artifacts are GGUF; their logits come from llama.cpp, so that only the measures can differ.
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit import formats
from toolkit.quality import measures
from toolkit.quality.measures import Comparison

MAGIC = b"_logits_"


def read_tokens(path: Path) -> NDArray[np.int32]:
    """The sequences that llama-perplexity read: int32 [chunks, context].

    The first token of all is the bos token, which then replaces the first of every sequence.
    """
    with path.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise SystemExit(f"{path}: not a file of llama-perplexity --save-all-logits")
        context, _, chunks = np.frombuffer(stream.read(12), np.int32)
        ids = np.frombuffer(stream.read(4 * context * chunks), np.int32)
    sequences: NDArray[np.int32] = ids.reshape(chunks, context).copy()
    sequences[:, 0] = sequences[0, 0]
    return sequences


def read_logits(folder: Path, sequences: NDArray[np.int32]) -> list[NDArray[np.float32]]:
    """Logits of every sequence, in llama.cpp."""
    session = formats.get("gguf").open_session(folder)
    try:
        return [session.logits(ids.tolist()) for ids in sequences]
    finally:
        session.close()


def judge_second_half(found: Comparison) -> Comparison:
    """The positions that llama-perplexity looks at: the second half, but for the last."""
    places = np.arange(len(found.kl))
    return found.select((places >= len(places) // 2) & (places < len(places) - 1))


def main() -> None:
    """Print every measure with its standard error."""
    base, *folders = map(Path, sys.argv[1:])
    sequences = read_tokens(base)
    source, artifact = (read_logits(folder, sequences) for folder in folders)
    parts = [
        judge_second_half(measures.compare_logits(first, second, ids.tolist()))
        for first, second, ids in zip(source, artifact, sequences, strict=True)
    ]
    for name, one in measures.join(parts).summarize().items():
        error = "" if one.error is None else f" ± {one.error:.6f}"
        print(f"{name:20} {one.value:.6f}{error}")


if __name__ == "__main__":
    main()
