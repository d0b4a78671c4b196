"""The text, token by token, with how far the artifact was from its source before each."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.pages import make_visible
from toolkit.quality.details import Details
from toolkit.reporting.scale import Scale

WORST = 10
BEFORE, AFTER = 12, 5  # tokens of context around a bad one


@dataclass(frozen=True)
class Token:
    """A token and the prediction of it: `kl` in nats, None for the first of a sequence.

    `delta_p` is the probability that the artifact gave the token less the source's, in percent
    points; `same_top` whether both had the same token as the most likely.
    """

    place: int
    text: str
    kl: float | None = None
    delta_p: float = 0.0
    same_top: bool = True

    @property
    def shown(self) -> str:
        """Its text with every character visible; an empty one as a sign."""
        return make_visible(self.text) or "∅"

    @property
    def breaks(self) -> bool:
        """Whether a line ends in it."""
        return "\n" in self.text

    def describe(self) -> str:
        """What a pointer on the token tells."""
        if self.kl is None:
            return f"“{self.shown}”  token {self.place}: the first of its sequence, not predicted"
        top = "same" if self.same_top else "another"
        return (
            f"“{self.shown}”  token {self.place}: KL {self.kl:.3g} nats, "
            f"Δp {self.delta_p:+.1f} %, {top} most likely token"
        )


@dataclass(frozen=True)
class Bad:
    """One of the worst predictions with the tokens around it."""

    rank: int
    token: Token
    before: str
    after: str


@dataclass(frozen=True)
class Trace:
    """The first tokens of a text, and the worst of all."""

    shown: tuple[Token, ...]
    total: int
    worst: tuple[Bad, ...]

    def rank(self, token: Token) -> int | None:
        """Its place among the worst."""
        return next((bad.rank for bad in self.worst if bad.token is token), None)


def trace(details: Details, most_tokens: int) -> Trace:
    """Pair every token with the prediction made of it from those before it."""
    tokens = _list_tokens(details)
    predicted = [token for token in tokens if token.kl is not None]
    by_kl = sorted(predicted, key=lambda token: (-(token.kl or 0.0), token.place))
    worst = tuple(
        Bad(
            rank, token, _join(tokens[max(0, token.place - BEFORE) : token.place]),
            _join(tokens[token.place + 1 : token.place + 1 + AFTER]),
        )
        for rank, token in enumerate(by_kl[:WORST], 1)
    )  # fmt: skip
    return Trace(tuple(tokens[:most_tokens]), len(tokens), worst)


def _list_tokens(details: Details) -> list[Token]:
    """Tokens with what was foreseen after the one before, within each sequence."""
    tokens = []
    starts = {0, *itertools.accumulate(details.sequences)}
    for place, text in enumerate(details.texts):
        if place in starts:
            tokens.append(Token(place, text))
            continue
        known = place - 1
        change = details.delta_p[known] or 0.0
        tokens.append(Token(place, text, details.kl[known], change, details.same_top[known]))
    return tokens


def _join(tokens: Sequence[Token]) -> str:
    return "".join(token.shown for token in tokens)


def level(token: Token, scale: Scale) -> int:
    """The token's level; 0 for one that was not predicted."""
    return 0 if token.kl is None else scale.level(token.kl)
