"""An artifact in its own runtime beside its source, on the same sequences of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.checkpoint import Checkpoint
from toolkit.console import Console
from toolkit.decoder import Decoder
from toolkit.formats import Session
from toolkit.progress import Advance, ignore
from toolkit.quality import cache, measures, reference
from toolkit.quality.measures import Comparison
from toolkit.quality.reference import Array, CheckpointWeights

# Tokens that go through the layers together. More share one reading of the weights, but at
# Phi-3-mini's shape the widest layer then takes 131 kB a token.
PASS_TOKENS = 4096
# Positions whose logits of the source are held at once: 66 MB at Phi-3's vocabulary.
LOGIT_ROWS = 512

Sequences = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Source:
    """A checkpoint that has read sequences of one length n.

    `states` is what its head multiplies, float32 [texts, n, hidden].
    """

    checkpoint: Checkpoint
    decoder: Decoder
    states: Array

    def logits(self, text: int, rows: slice) -> Array:
        """Logits after some positions of a sequence: float32 [rows, vocab]."""
        weights = CheckpointWeights(self.checkpoint, ignore)
        return reference.project(
            weights, self.decoder, self.decoder.head_name, self.states[text, rows]
        )


def read_source(
    checkpoint: Checkpoint, decoder: Decoder, sequences: Sequences, console: Console
) -> Source:
    """Have the source read sequences of one length, unless it has done so before (cache.py).

    ValueError as in reference.forward.
    """
    name = cache.name_states(checkpoint, decoder, sequences)
    shape = (len(sequences), len(sequences[0]), decoder.hidden)
    states = cache.load(name, shape)
    if states is None:
        states = _run(checkpoint, decoder, sequences, console)
        if not cache.store(name, states):
            console.note(f"{cache.cache_folder()}: cannot be written; the source's work is lost")
    return Source(checkpoint, decoder, states)


def compare(
    session: Session, source: Source, sequences: Sequences, console: Console, first: int = 0
) -> Comparison:
    """Compare logits after every token, from one on; ValueError names what cannot be compared."""
    parts: list[Comparison] = []
    with console.waiting(f"{session.runtime} reads the text") as tell:
        for text, ids in enumerate(sequences):
            tell(f"sequence {text + 1} of {len(sequences)}")
            parts += _compare_one(session, source, text, ids, first)
    return measures.join(parts)


def _compare_one(
    session: Session, source: Source, text: int, ids: Sequence[int], first: int
) -> list[Comparison]:
    """One sequence, in parts of LOGIT_ROWS positions."""
    artifact = session.logits(list(ids))
    vocabulary = source.decoder.vocab
    if artifact.shape != (len(ids), vocabulary):
        raise ValueError(
            f"logits of {len(ids)} tokens: the source's are {[len(ids), vocabulary]}, "
            f"the artifact's {list(artifact.shape)}"
        )
    parts = []
    for start in range(first, len(ids), LOGIT_ROWS):
        rows = slice(start, min(start + LOGIT_ROWS, len(ids)))
        next_id = ids[rows.stop] if rows.stop < len(ids) else None
        logits = source.logits(text, rows)
        parts.append(measures.compare_logits(logits, artifact[rows], ids[rows], next_id))
    return parts


def _run(checkpoint: Checkpoint, decoder: Decoder, sequences: Sequences, console: Console) -> Array:
    """Final states of all sequences, some in a pass over the weights."""
    passes = [sequences[some] for some in split_passes(sequences)]
    head_bytes = checkpoint.tensors[decoder.head_name].nbytes
    total_bytes = len(passes) * (reference.bytes_to_read(checkpoint, decoder) - head_bytes)
    with console.progress("reading the text with the source", total_bytes) as advance:
        return np.concatenate([_read(checkpoint, decoder, some, advance) for some in passes])


def split_passes(sequences: Sequences) -> list[slice]:
    """Sequences of one length, each part of them PASS_TOKENS at most, or one that is longer."""
    together = max(1, PASS_TOKENS // len(sequences[0]))
    return [slice(start, start + together) for start in range(0, len(sequences), together)]


def _read(
    checkpoint: Checkpoint, decoder: Decoder, sequences: Sequences, advance: Advance
) -> Array:
    return reference.final_states_of(CheckpointWeights(checkpoint, advance), decoder, sequences)
