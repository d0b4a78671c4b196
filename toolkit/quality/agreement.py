"""Up to which length an artifact agrees with its source: windows, blocks, LongRoPE's switch."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from toolkit.artifact import Limits
from toolkit.decoder import Decoder
from toolkit.quality.details import Range
from toolkit.quality.gate import list_demands
from toolkit.quality.measures import Comparison, Estimate

# A range is off when its mean KL is so many times that of the best range, surely, and by more than
# what runtimes differ by rounding. An attention that sees other tokens shows as 10 times and more.
OFF_FACTOR = 2.0
ROUNDING_KL = 1e-3
# Standard errors by which a limit, or the best range, must be missed to be surely missed.
SURE_ERRORS = 3.0
# Divergences have long tails: the mean of fewer tokens than these, and its standard error too, is
# what two or three of them make it.
LEAST_JUDGED = 100


def find_switches(decoder: Decoder, length: int) -> list[int]:
    """Lengths below `length` up to which something holds.

    The window, LongRoPE's short factors, the local blocks of block-sparse attention.
    """
    original = decoder.rope.original_context if decoder.rope.is_long else None
    local = decoder.sparse.local_tokens if decoder.sparse else None
    return sorted({one for one in (decoder.window, original, local) if one and one < length})


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
    short = min(length, decoder.rope.original_context) if decoder.rope.is_long else length
    cuts = [short if after <= short else length for after in bounds[1:]]
    parts = [
        select_positions(measure(cut), cut, before, after)
        for cut, (before, after) in zip(cuts, pairwise(bounds), strict=True)
    ]
    summaries = [part.summarize() for part in parts]
    means = [summary["mean KL"] for summary in summaries]
    is_judged = [len(part.kl) >= LEAST_JUDGED for part in parts]
    known = [mean for mean, is_known in zip(means, is_judged, strict=True) if is_known]
    return tuple(
        Range(
            first=before + 1,
            last=after,
            tokens=len(part.kl),
            mean_kl=means[place].value,
            kl_error=means[place].error or 0.0,
            top1=part.top1,
            claimed=valid_context[0] <= before + 1 and after <= valid_context[1],
            agrees=not is_judged[place]
            or (is_within(summaries[place], limits) and not _is_off(means[place], known)),
            judged=is_judged[place],
        )
        for place, (part, (before, after)) in enumerate(zip(parts, pairwise(bounds), strict=True))
    )


def select_positions(found: Comparison, length: int, before: int, after: int) -> Comparison:
    """Of sequences of `length`, what was measured after more than `before`, at most `after`."""
    places = np.arange(len(found.kl)) % length
    return found.select((before <= places) & (places < after))


def is_within(summary: Mapping[str, Estimate], limits: Limits) -> bool:
    """True when no limit is surely missed; one on the next token holds where there is one."""
    for demand in list_demands(limits):
        if (found := summary.get(demand.measure)) is not None:
            slack = SURE_ERRORS * (found.error or 0.0)
            if not demand.is_met(found.value + (slack if demand.is_lowest else -slack)):
                return False
    return True


def tell_agreement(ranges: Sequence[Range]) -> str:
    """Where it agreed, where it stopped and where nobody can say, in one line."""
    said: dict[str, list[str]] = {"agrees": [], "not": [], "too short to say": []}
    for one in ranges:
        word = "too short to say" if not one.judged else "agrees" if one.agrees else "not"
        said[word].append(f"{one.first} to {one.last}")
    return "; ".join(
        f"{word} at {' and '.join(some)} tokens" for word, some in said.items() if some
    )


def _is_off(mean: Estimate, means: Sequence[Estimate]) -> bool:
    """True when a range is surely further from the source than the best one."""
    best = min(means, key=lambda one: one.value)
    error = math.hypot(mean.error or 0.0, best.error or 0.0)
    least = max(OFF_FACTOR * best.value, best.value + SURE_ERRORS * error + ROUNDING_KL)
    return mean.value > least
