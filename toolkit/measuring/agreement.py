"""How much two answers to one prompt agree, word by word."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

Segment = tuple[str, bool]


@dataclass(frozen=True)
class Match:
    """Two answers compared by their words, which white space separates.

    `similarity` is 2 M / T of difflib: words in matching blocks of all words, 1 for the same words.
    `first_difference` is the number of the first word that differs, from 1 on; None without.
    """

    is_exact: bool
    similarity: float
    first_difference: int | None


@dataclass(frozen=True)
class Agreement:
    """Two sides over all prompts that both have answered.

    `exact_rate` is the share of answers with the same words, `similarity` the mean,
    `first_difference` the median of those that differ, `length_ratio` all words of the second side
    over all of the first.
    """

    first: str
    second: str
    prompts: int
    exact_rate: float
    similarity: float
    first_difference: float | None
    length_ratio: float | None


def match(one: str, other: str) -> Match:
    """Compare two answers."""
    a, b = one.split(), other.split()
    if a == b:
        return Match(True, 1.0, None)
    pairs = zip(a, b, strict=False)
    shared = min(len(a), len(b))
    first = next((n for n, (x, y) in enumerate(pairs, 1) if x != y), shared + 1)
    return Match(False, SequenceMatcher(None, a, b, autojunk=False).ratio(), first)


def measure(first: str, second: str, pairs: Sequence[tuple[str, str]]) -> Agreement | None:
    """Sum up the answers of two sides, pairs of one prompt each; None without any."""
    if not pairs:
        return None
    matches = [match(one, other) for one, other in pairs]
    places = [m.first_difference for m in matches if m.first_difference is not None]
    words = [sum(len(text.split()) for text in side) for side in zip(*pairs, strict=True)]
    return Agreement(
        first, second, len(pairs),
        exact_rate=sum(m.is_exact for m in matches) / len(matches),
        similarity=statistics.fmean(m.similarity for m in matches),
        first_difference=statistics.median(places) if places else None,
        length_ratio=words[1] / words[0] if words[0] else None,
    )  # fmt: skip


def split_differences(text: str, other: str) -> list[Segment]:
    """Split a text into pieces, with whether a piece's words differ from the other text's."""
    pieces, others = re.findall(r"\S+\s*|\s+", text), re.findall(r"\S+\s*|\s+", other)
    a, b = [piece.strip() for piece in pieces], [piece.strip() for piece in others]
    segments: list[Segment] = []
    for tag, start, end, _, _ in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if end > start:
            segments.append(("".join(pieces[start:end]), tag != "equal"))
    return segments
