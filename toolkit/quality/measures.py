"""How far two models' next-token distributions are apart, on the same tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Positions whose distributions are held at once, as float64: 16 MB at Phi-3's vocabulary.
CHUNK_ROWS = 64


@dataclass(frozen=True)
class Comparison:
    """A source and an artifact on one text of n tokens.

    `kl` is the Kullback-Leibler divergence KL(source || artifact) after every position, float64
    [n], in nats; `top1` the share of positions whose most likely next token is the same.
    Perplexities are of the text itself: exp of the mean negative log-likelihood of tokens 1 to n-1.
    """

    kl: NDArray[np.float64]
    top1: float
    perplexity_source: float
    perplexity_artifact: float

    @property
    def mean_kl(self) -> float:
        """Mean divergence, in nats per token."""
        return float(self.kl.mean())

    def kl_quantile(self, share: float) -> float:
        """Divergence that `share` (0 to 1) of the positions do not exceed, in nats."""
        return float(np.quantile(self.kl, share))


def compare_logits(source: NDArray[Any], artifact: NDArray[Any], ids: Sequence[int]) -> Comparison:
    """Compare logits [n, vocab] of two models after every one of n >= 2 tokens `ids`.

    ValueError when the shapes differ, or names the side that holds NaN or infinity.
    """
    if not source.shape == artifact.shape == (len(ids), source.shape[-1]) or len(ids) < 2:
        raise ValueError(
            f"logits of {len(ids)} tokens: the source's are {list(source.shape)}, "
            f"the artifact's {list(artifact.shape)}"
        )
    for side, logits in (("source", source), ("artifact", artifact)):
        if not np.isfinite(logits).all():
            raise ValueError(f"the {side}'s logits hold NaN or infinity")
    kl = np.empty(len(ids))
    likelihoods = np.empty((2, len(ids) - 1))
    for start in range(0, len(ids), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        p, q = log_softmax(source[rows]), log_softmax(artifact[rows])
        kl[rows] = np.sum(np.exp(p) * (p - q), axis=-1)
        following = np.asarray(ids[start + 1 : start + CHUNK_ROWS + 1], np.intp)
        stop = start + len(following)
        likelihoods[0, start:stop] = p[np.arange(len(following)), following]
        likelihoods[1, start:stop] = q[np.arange(len(following)), following]
    perplexities = np.exp(-likelihoods.mean(axis=-1))
    agreement = np.mean(source.argmax(axis=-1) == artifact.argmax(axis=-1))
    # Rounding may leave a divergence of zero at -1e-17.
    return Comparison(
        np.maximum(kl, 0.0), float(agreement), float(perplexities[0]), float(perplexities[1])
    )


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
