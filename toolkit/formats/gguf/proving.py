"""Which splitting of llama.cpp's is the source's, by token ids: a name alone proves little.

The way that a pattern is known by is tried first, then every other one, on texts that tell ways
apart. The first that gives all ids of the source is taken. Of Mistral's tekken, for one, the way
of that name leaves marks apart, and another one does not. Where none does, the nearest is written,
for llama.cpp needs a name.
"""

import hashlib
import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.probes import PROBES
from toolkit.checkpoint.tokenizer import encode, read_tokenizer
from toolkit.formats.gguf.encoding import GgufTokenizer
from toolkit.formats.gguf.splitting import WAYS
from toolkit.formats.gguf.tokenizer import write_vocabulary
from toolkit.formats.gguf.vocabulary import Vocabulary

FRAGMENTS = (
    "word", "Word", "WORD", "camelCase", "it's", "IT'S", "don't", "we'LL", "'s", "'", "1", "23",
    "456", "7890", "12345678", "½", "٣", "é", "e\u0301", "ß", "नमस्ते", "สวัสดี", "漢字", "ひらがな",
    "한국어", "привет", "x_y", "(", ")", "...", "!?", "$", "+=", "//", "\U0001f600", "\u2019", " ",
    "  ", "    ", "\n", "\n\n", " \n", "\r\n", "\t", "\u3000",
)  # fmt: skip
MIXTURES, LONGEST = 150, 6
EVERY = 4  # of all texts: what every way is tried on


@dataclass(frozen=True)
class Proof:
    """The way that was chosen, and how many of the texts it encodes as the source does not."""

    name: str
    differing: int
    texts: int


_known: dict[str, Proof] = {}  # by the digest of tokenizer.json: it takes seconds


def complete(vocabulary: Vocabulary, checkpoint: Checkpoint) -> Vocabulary:
    """The vocabulary with the name of a splitting, the nearest one where none is the source's."""
    if not vocabulary.is_byte_level:
        return vocabulary
    if _digest(checkpoint) not in _known:
        with tempfile.TemporaryDirectory(prefix="phiship-tokenizer-") as scratch:
            write_proven(Path(scratch) / "model.gguf", vocabulary, checkpoint)
    return replace(vocabulary, splitting=_known[_digest(checkpoint)].name)


def write_proven(
    path: Path, vocabulary: Vocabulary, checkpoint: Checkpoint, name: str = ""
) -> Proof:
    """Write a byte-level vocabulary alone with the name that is proven for it; `name` the model's.

    Returns the first way of llama.cpp's without a difference, or else the nearest.
    """
    first = vocabulary.splitting or WAYS[0].name
    write_vocabulary(path, checkpoint, replace(vocabulary, splitting=first), name)
    proof = _known.get(_digest(checkpoint)) or _search(path, first, vocabulary, checkpoint)
    _known[_digest(checkpoint)] = proof
    if proof.name != first:
        write_vocabulary(path, checkpoint, replace(vocabulary, splitting=proof.name), name)
    return proof


def _digest(checkpoint: Checkpoint) -> str:
    return hashlib.sha256((checkpoint.tokenizer_folder / "tokenizer.json").read_bytes()).hexdigest()


def _search(path: Path, first: str, vocabulary: Vocabulary, checkpoint: Checkpoint) -> Proof:
    """Try ways on a file that has the first: all on a few texts, on all texts those best there."""
    tokenizer = read_tokenizer(checkpoint)
    expected = {text: encode(tokenizer, text) for text in (*PROBES, *_mix())}
    best = Proof(first, _count_differing(path, first, expected), len(expected))
    # Of what a normalizer changes every way has other ids.
    if not best.differing or (vocabulary.splitting and tokenizer.normalizer):
        return best
    few = dict(list(expected.items())[::EVERY])
    counts = {way.name: _count_differing(path, way.name, few) for way in WAYS}
    for name in (name for name, count in counts.items() if count == min(counts.values())):
        differing = _count_differing(path, name, expected)
        if differing < best.differing:
            best = Proof(name, differing, len(expected))
        if not differing:
            break
    return best


def _count_differing(path: Path, name: str, expected: Mapping[str, list[int]]) -> int:
    """Count the texts of which a way has other ids."""
    encoder = GgufTokenizer(path, pre=name)
    try:
        return sum(encoder.encode(text) != ids for text, ids in expected.items())
    finally:
        encoder.close()


def _mix() -> Iterator[str]:
    """Seeded mixtures of what the patterns of published tokenizers treat differently."""
    rng = random.Random(7)
    for _ in range(MIXTURES):
        yield "".join(rng.choices(FRAGMENTS, k=rng.randint(2, LONGEST)))
