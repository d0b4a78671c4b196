"""How far two models' next-token distributions are apart, on the same tokens.

The definitions are those of llama.cpp's `llama-perplexity --kl-divergence`
(tools/perplexity/perplexity.cpp). Two things differ: its source is rounded to 16 bits and cut off
at exp(-16), here it is not; it looks at the second half of each sequence, here every position
counts, for KL and top-1 also the last one, which has no next token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Positions whose distributions are held at once, as float64: 16 MB at Phi-3's vocabulary.
CHUNK_ROWS = 64
KL_SHARES = (0.5, 0.9, 0.99, 0.999, 1.0)
DELTA_P_SHARES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
SHARE_NAMES = {0.0: "min", 0.5: "median", 1.0: "max"}
PERCENT = 100
MOST_LOSS = 600.0  # What a broken artifact's perplexity is cut to: JSON has no infinity.


@dataclass(frozen=True)
class Estimate:
    """A number, and its standard error where it has one."""

    value: float
    error: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A source and an artifact on n tokens of one text or several.

    `kl` is the Kullback-Leibler divergence KL(source || artifact) after every position, float64
    [n], in nats; `same_top` whether the most likely next token is the same, bool [n]. `losses` are
    the source's and the artifact's -ln p of the token that follows, float64 [2, n], NaN where a
    sequence ends. Perplexities are of the text itself: exp of the mean loss.
    """

    ids: NDArray[np.int64]
    kl: Floats
    same_top: NDArray[np.bool_]
    losses: Floats

    @property
    def mean_kl(self) -> float:
        """Mean divergence, in nats per token."""
        return float(self.kl.mean())

    @property
    def top1(self) -> float:
        """Share of positions whose most likely next token is the same."""
        return float(self.same_top.mean())

    @property
    def perplexity_source(self) -> float:
        """The source's perplexity on the text."""
        return _exponential(self.known_losses[0]).value

    @property
    def perplexity_artifact(self) -> float:
        """The artifact's perplexity on the text."""
        return _exponential(self.known_losses[1]).value

    @property
    def delta_p(self) -> Floats:
        """The artifact's probability of the actual next token less the source's.

        In percent points, one for each token that has a next one: [n - 1] for one sequence.
        """
        source, artifact = self.known_losses
        changes: Floats = PERCENT * (np.exp(-artifact) - np.exp(-source))
        return changes

    @property
    def known_losses(self) -> Floats:
        """`losses` where a token follows."""
        return self.losses[:, ~np.isnan(self.losses[0])]

    def kl_quantile(self, share: float) -> float:
        """Divergence that `share` (0 to 1) of the positions do not exceed, in nats."""
        return float(np.quantile(self.kl, share))

    def select(self, chosen: NDArray[np.bool_]) -> "Comparison":
        """Only some positions, as a mask [n]."""
        return Comparison(
            self.ids[chosen], self.kl[chosen], self.same_top[chosen], self.losses[:, chosen]
        )

    def summarize(self) -> dict[str, Estimate]:
        """Every measure by its name, in the order in which people read them.

        KL in nats, agreement as a share, changes of probability in percent points. Measures of what
        follows are missing when no token follows one, all when there is none.
        """
        found = self._summarize_kl() if len(self.kl) else {}
        if self.known_losses.size:
            found |= {**self._summarize_losses(), **self._summarize_delta_p()}
        return found

    def _summarize_kl(self) -> dict[str, Estimate]:
        found = {"mean KL": _mean(self.kl)}
        for share in KL_SHARES:
            found[f"{name_share(share)} KL"] = Estimate(self.kl_quantile(share))
        count, top1 = len(self.kl), self.top1
        error = float(np.sqrt(top1 * (1 - top1) / (count - 1))) if count > 1 else 0.0
        return {**found, "top-1 agreement": Estimate(top1, error)}

    def _summarize_losses(self) -> dict[str, Estimate]:
        source, artifact = self.known_losses
        return {
            "source perplexity": _exponential(source),
            "artifact perplexity": _exponential(artifact),
            # Both read the same tokens, so most of their errors cancel in the difference.
            "perplexity ratio": _exponential(artifact - source),
            "ln perplexity ratio": _mean(artifact - source),
        }

    def _summarize_delta_p(self) -> dict[str, Estimate]:
        changes = self.delta_p
        squares = _mean(np.square(changes))
        rms = float(np.sqrt(squares.value))
        error = 0.5 * (squares.error or 0.0) / rms if rms else 0.0
        found = {"mean Δp": _mean(changes), "RMS Δp": Estimate(rms, error)}
        for share in DELTA_P_SHARES:
            found[f"{name_share(share)} Δp"] = Estimate(float(np.quantile(changes, share)))
        return found


def name_share(share: float) -> str:
    """How a quantile is called: min, 1 %, median, 99.9 %, max."""
    return SHARE_NAMES.get(share, f"{PERCENT * share:g} %")


def join(parts: Sequence[Comparison]) -> Comparison:
    """Several sequences as one comparison, in their order; at least one."""
    return Comparison(
        ids=np.concatenate([part.ids for part in parts]),
        kl=np.concatenate([part.kl for part in parts]),
        same_top=np.concatenate([part.same_top for part in parts]),
        losses=np.concatenate([part.losses for part in parts], axis=1),
    )


def compare_logits(
    source: NDArray[Any], artifact: NDArray[Any], ids: Sequence[int], next_id: int | None = None
) -> Comparison:
    """Compare logits [n, vocab] of two models after every one of n tokens `ids`.

    `next_id` is what follows the last of them; without, n is at least 2. ValueError when the shapes
    differ, or names the side that holds NaN or infinity.
    """
    count = len(ids)
    known = [*ids[1:], *([] if next_id is None else [next_id])]
    if not source.shape == artifact.shape == (count, source.shape[-1]) or not known:
        raise ValueError(
            f"logits of {count} tokens: the source's are {list(source.shape)}, "
            f"the artifact's {list(artifact.shape)}"
        )
    kl, losses = np.empty(count), np.full((2, count), np.nan)
    for start in range(0, count, CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        p, q = log_softmax(source[rows], "source"), log_softmax(artifact[rows], "artifact")
        kl[rows] = np.sum(np.exp(p) * (p - q), axis=-1)
        following = np.array(known[rows], np.intp)
        places = np.arange(len(following))
        for side, found in enumerate((p, q)):
            losses[side, start : start + len(following)] = -found[places, following]
    same_top = source.argmax(axis=-1) == artifact.argmax(axis=-1)
    # Rounding may leave a divergence of zero at -1e-17.
    return Comparison(np.array(ids, np.int64), np.maximum(kl, 0.0), same_top, losses)


def compare_sequences(
    source: Sequence[NDArray[Any]], artifact: Sequence[NDArray[Any]],
    texts: Sequence[Sequence[int]], first: int = 0,
) -> Comparison:  # fmt: skip
    """The same for several sequences, logits [n, vocab] of each, from token `first` on."""
    return join(
        [
            compare_logits(one[first:], other[first:], ids[first:])
            for one, other, ids in zip(source, artifact, texts, strict=True)
        ]
    )


def log_softmax(logits: NDArray[Any], side: str = "model") -> Floats:
    """Log-probabilities over the last axis, in float64; ValueError when one is not finite."""
    if not np.isfinite(logits).all():
        raise ValueError(f"the {side}'s logits hold NaN or infinity")
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _mean(values: Floats) -> Estimate:
    """Mean and its standard error, which is 0 for a single value."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return Estimate(float(values.mean()), spread / len(values) ** 0.5)


def _exponential(values: Floats) -> Estimate:
    """exp of the mean; its error to first order."""
    mean = _mean(values)
    value = math.exp(min(mean.value, MOST_LOSS))
    return Estimate(value, value * (mean.error or 0.0))
