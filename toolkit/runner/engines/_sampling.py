"""Choosing the next token, for engines that leave it to us; and seeds, for all of them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from ..settings import Sampling

SEEDS = 2**31 - 1  # every engine takes these, and none takes one of them for "random"


def choose_seed(sampling: Sampling, part: int = 0) -> int:
    """Return a seed that any engine takes; another for each `part` of one answer."""
    if sampling.seed is None:
        return secrets.randbelow(SEEDS)
    return (sampling.seed + part) % SEEDS


def make_chooser(sampling: Sampling) -> Callable[[Any], int]:
    """Return what chooses a token id from float logits [vocabulary] of NumPy, in any shape.

    Temperature first, then the fewest likeliest tokens that reach `top_p`, as transformers and
    onnxruntime-genai do.
    """
    import numpy

    rng = numpy.random.default_rng(choose_seed(sampling))

    def choose(logits: Any) -> int:
        scaled = logits.reshape(-1).astype(numpy.float64) / sampling.temperature
        weights = numpy.exp(scaled - scaled.max())
        order = numpy.argsort(-weights, kind="stable")
        sums = numpy.cumsum(weights[order])
        count = 1 + int(numpy.searchsorted(sums[:-1], sampling.top_p * sums[-1]))
        place = numpy.searchsorted(sums[: count - 1], rng.random() * sums[count - 1], side="right")
        return int(order[place])

    return choose
