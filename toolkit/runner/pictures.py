"""Pictures amid a text: where they stand, and the ids of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .failure import Failure

PICTURE = "\0"  # stands for a picture in a chat's text; no engine reads a text that holds it


def mark_pictures(content: str, pictures: int) -> str:
    """A question with pictures in front, each on its own line, as the model was trained."""
    return f"{PICTURE}\n" * pictures + content


def split_pictures(
    text: str, counts: Sequence[int], encode: Callable[[str], list[int]]
) -> list[int]:
    """Ids of a text with pictures of so many tokens each: -1 for the first one's, and so on.

    Each part between pictures is encoded by itself, as the source's processor does; its tokenizer
    begins each with <s>. Failure `request` when there are more marks or fewer than pictures.
    """
    first, *rest = text.split(PICTURE)
    if len(rest) != len(counts):
        raise Failure("request", f"a text has {len(rest)} places for {len(counts)} pictures")
    ids = list(encode(first))
    for place, count in enumerate(counts):
        ids += [-1 - place] * count + list(encode(rest[place]))
    return ids
