"""Which experts a token goes to, and how much each one counts: sparsemixer at inference."""

import numpy as np
from numpy.typing import NDArray

from toolkit.decoder import Experts

Wide = NDArray[np.float64]


def route(logits: Wide, experts: Experts) -> tuple[NDArray[np.intp], Wide]:
    """Pick experts by a router's logits [n, count]: indices and weights, each [n, per_token].

    Follows sparsemixer of transformers' Phimoe without its training noise, in float64: of two
    experts that are nearly as good the last bits decide.
    """
    left, rows = logits.copy(), np.arange(len(logits))
    picked = np.empty((len(logits), experts.per_token), np.intp)
    weights = np.empty(picked.shape, np.float64)
    for place in range(experts.per_token):
        picked[:, place] = left.argmax(axis=1)
        best = left[rows, picked[:, place], None]
        with np.errstate(invalid="ignore", divide="ignore"):
            distance = (best - logits) / np.maximum(np.abs(logits), best)
        exponents = np.where(distance > 2 * experts.jitter, -np.inf, left - best)
        weights[:, place] = 1 / np.exp(exponents).sum(axis=1)
        left[rows, picked[:, place]] = -np.inf
    return picked, weights
