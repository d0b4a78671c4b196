"""How far from its source an artifact may be: a limit on the mean KL for each number of bits.

Derived in docs/quality.md from a real language model, and from published figures of Phi-3.
"""

import msgspec

from toolkit.artifact import Limits
from toolkit.quality.sensitivity import measure_bits
from toolkit.quantize.grids import GridEncoder
from toolkit.stream import DataFile

# Fewest bits of a code in the artifact's matrices -> nats per token on the gate's text.
MOST_KL = ((16, 0.01), (8, 0.05), (6, 0.2), (5, 0.5), (0, 1.2))


def fill_limits(limits: Limits, data: DataFile) -> Limits:
    """The limits of a recipe; its precision's limit on the mean KL where it sets none."""
    if limits.max_kl is not None:
        return limits
    return msgspec.structs.replace(limits, max_kl=choose_limit(count_bits(data)))


def choose_limit(bits: int) -> float:
    """The limit on the mean KL, in nats per token, for codes of so many bits."""
    return next(limit for least, limit in MOST_KL if bits >= least)


def count_bits(data: DataFile) -> int:
    """Bits of the shortest codes in a data file; of floats 16 and more."""
    measured = measure_bits(data)
    return min(
        piece.encoder.bits if isinstance(piece.encoder, GridEncoder) else int(measured[name])
        for piece in data.pieces
        if piece.columns > 1
        for name in piece.sources
    )
