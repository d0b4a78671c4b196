"""What two token sequences have in common at their beginning."""

from __future__ import annotations

from collections.abc import Sequence


def count_common(computed: Sequence[int], prompt: Sequence[int]) -> int:
    """Return how many first tokens of a prompt are computed already.

    Its last token never counts: the network must see one to say what follows.
    """
    longest = min(len(computed), len(prompt) - 1)
    for place in range(longest):
        if computed[place] != prompt[place]:
            return place
    return longest
