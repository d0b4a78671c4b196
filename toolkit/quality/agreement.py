"""Up to which length an artifact agrees with its source: windows, and the switch of LongRoPE."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from toolkit.artifact import Limits
from toolkit.decoder import Decoder
from toolkit.quality.details import Range
from toolkit.quality.measures import Comparison, Estimate

# A range is off when its mean KL is so many times that of the best range, surely, and by more than
# what runtimes differ by rounding. An attention that sees other tokens shows as 10 times and more.
OFF_FACTOR = 2.0
OFF_ERRORS = 3.0
ROUNDING_KL = 1e-3


def find_switches(decoder: Decoder, length: int) -> list[int]:
    """Lengths below `length` up to which something holds: the window, LongRoPE's short factors."""
    original = decoder.rope.original_context if decoder.rope.is_long else None
    return sorted({one for one in (decoder.window, original) if one and one < length})


def measure_ranges(
    measure: Callable[[int], Comparison],
    decoder: Decoder,
    length: int,
    valid_context: tuple[int, int],
    limits: Limits,
) -> tuple[Range, ...]:
    """Measure each range between two switches by itself; empty when there is no switch.

    `measure` compares artifact and source on sequences that are cut at so many tokens: LongRoPE
    makes a longer sequence another one from its first token on.
    """
    bounds = [0, *find_switches(decoder, length), length]
    if len(bounds) == 2:
        return ()
    cuts = bounds[1:] if decoder.rope.is_long else [length] * (len(bounds) - 1)
    parts = [
        select_positions(measure(cut), cut, before, after)
        for cut, (before, after) in zip(cuts, pairwise(bounds), strict=True)
    ]
    means = [part.summarize()["mean KL"] for part in parts]
    return tuple(
        Range(
            first=before + 1,
            last=after,
            tokens=len(part.kl),
            mean_kl=mean.value,
            kl_error=mean.error or 0.0,
            top1=part.top1,
            claimed=valid_context[0] <= before + 1 and after <= valid_context[1],
            agrees=is_within(part, limits) and not _is_off(mean, means),
        )
        for part, mean, (before, after) in zip(parts, means, pairwise(bounds), strict=True)
    )


def select_positions(found: Comparison, length: int, before: int, after: int) -> Comparison:
    """Of sequences of `length`, what was measured after more than `before`, at most `after`."""
    places = np.arange(len(found.kl)) % length
    return found.select((before <= places) & (places < after))


def is_within(found: Comparison, limits: Limits) -> bool:
    """True when the means keep the limits."""
    return found.mean_kl <= limits.max_kl and found.top1 >= limits.min_top1


def tell_agreement(ranges: Sequence[Range]) -> str:
    """Where it agreed and where it stopped, in one line."""
    agreed = [f"{one.first} to {one.last}" for one in ranges if one.agrees]
    off = [f"{one.first} to {one.last}" for one in ranges if not one.agrees]
    return "; ".join(
        f"{word} {' and '.join(some)} tokens"
        for word, some in (("agrees at", agreed), ("not at", off))
        if some
    )


def _is_off(mean: Estimate, means: Sequence[Estimate]) -> bool:
    """True when a range is surely further from the source than the best one."""
    best = min(means, key=lambda one: one.value)
    error = math.hypot(mean.error or 0.0, best.error or 0.0)
    least = max(OFF_FACTOR * best.value, best.value + OFF_ERRORS * error + ROUNDING_KL)
    return mean.value > least
