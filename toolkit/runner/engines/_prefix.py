"""What two token sequences have in common at their beginning."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ..images import Pixels


def count_common(computed: Sequence[int], prompt: Sequence[int]) -> int:
    """Return how many first tokens of a prompt are computed already.

    Its last token never counts: the network must see one to say what follows.
    """
    longest = min(len(computed), len(prompt) - 1)
    for place in range(longest):
        if computed[place] != prompt[place]:
            return place
    return longest


def name_pictures(ids: Sequence[int], pixels: Pixels) -> list[int]:
    """Return ids in which those below 0 are numbers made of what their pictures show.

    `ids` are those of pictures.split_pictures. Two prompts then have in common what is the same in
    both, pictures and all.
    """
    names = []
    for values, (height, width) in zip(pixels.values, pixels.sizes, strict=True):
        crops = values[: 1 + height * width // values.shape[-1] ** 2]  # zeros lie behind them
        digest = hashlib.sha256(f"{height} x {width}".encode() + crops.tobytes()).digest()
        names.append(-1 - int.from_bytes(digest, "big"))
    return [token if token >= 0 else names[-1 - token] for token in ids]
