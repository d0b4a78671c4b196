"""What `tune` tries: the settings an engine offers, in order, and how tries are compared."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkit.measuring.result import Result

Settings = dict[str, int | None]

GOALS = ("decode", "prompt", "memory", "balanced")
# Batches change how a prompt is read and the memory that takes, and nothing of decoding.
KNOBS = {
    "decode": ("threads", "kv_bits"),
    "prompt": ("threads", "batch_tokens"),
    "memory": ("kv_bits", "batch_tokens"),
    "balanced": ("threads", "batch_tokens", "kv_bits"),
}
BATCHES = (64, 128, 256, 512, 1024, 2048)
MOST_THREADS = 5  # numbers of threads that are tried

# A try has to be better by more than runs of the same settings differ on a quiet machine.
MARGIN = 1.03
# Of the best rate; below it one round is enough.
CLEARLY_WORSE = 0.7
# Share of equal next tokens from which other bits in the cache count as harmless: 22 of 24.
AGREEMENT = 0.9
# Of the available memory, what a longer context may take: the rest is the system's.
MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Knob:
    """One setting and the values to try for it, in order."""

    name: str
    values: tuple[int, ...]


def list_knobs(
    goal: str, offered: Mapping[str, Sequence[int]], cpu_count: int, context_tokens: int
) -> list[Knob]:
    """Return what to try for a goal; an empty sequence in `offered` allows any number."""
    free = {
        "threads": choose_threads(cpu_count),
        "batch_tokens": tuple(size for size in BATCHES if size <= context_tokens),
    }
    knobs = []
    for name in KNOBS[goal]:
        if name in offered:
            values = tuple(sorted(offered[name], reverse=True)) or free.get(name, ())
            knobs.append(Knob(name, values))
    return [knob for knob in knobs if knob.values]


def choose_threads(cpu_count: int) -> tuple[int, ...]:
    """Return numbers of threads, most first: all up to MOST_THREADS, else evenly spread shares."""
    if cpu_count <= MOST_THREADS:
        return tuple(range(cpu_count, 0, -1))
    shares = {math.ceil(cpu_count * number / MOST_THREADS) for number in range(1, MOST_THREADS + 1)}
    return tuple(sorted(shares, reverse=True))


def list_contexts(lowest: int, highest: int) -> list[int]:
    """Return context lengths from the longest on, each about half of the one before."""
    contexts = [highest]
    while contexts[-1] // 2 > lowest:
        contexts.append(contexts[-1] // 2)
    return [*contexts, lowest] if contexts[-1] > lowest else contexts


def score(result: Result, goal: str) -> float:
    """Return how good a result is, more is better; only ratios of two scores mean something.

    Rates are geometric means over the prompt lengths, so that each length counts the same.
    """
    if goal == "memory":
        return 1e9 / result.peak_memory_bytes
    decode, prompt = rate(result, "decode"), rate(result, "prompt")
    return {"decode": decode, "prompt": prompt, "balanced": math.sqrt(decode * prompt)}[goal]


def rate(result: Result, what: str) -> float:
    """Return the tokens/s of `decode` or `prompt`, the geometric mean over the lengths."""
    if what == "prompt":
        rates = [length.prompt_tokens_per_second.median for length in result.lengths]
    else:
        rates = [s.median for length in result.lengths if (s := length.tokens_per_second)]
    return _mean(rates)


def _mean(rates: Sequence[float]) -> float:
    """Return the geometric mean; 0 of nothing."""
    return math.exp(sum(map(math.log, rates)) / len(rates)) if rates else 0.0


def measure_agreement(result: Result, default: Result) -> float | None:
    """Return the share of prefixes after which both choose the same token; None when not asked."""
    if result.judged is None or default.judged is None:
        return None
    pairs = list(zip(result.judged.next_ids, default.judged.next_ids, strict=False))
    return sum(one == other for one, other in pairs) / len(pairs) if pairs else None


def estimate_free_bytes(result: Result, context_tokens: int) -> float | None:
    """Return what stays available with a context of which every token is used; None: unknown.

    Engines that make their cache when they load have taken it already. For those that grow, the
    peaks after the shortest and the longest prompt show what a token takes.
    """
    if result.available_memory_bytes is None or len(result.lengths) < 2:
        return None
    first, last = result.lengths[0], result.lengths[-1]
    grown = last.peak_memory_bytes - first.peak_memory_bytes
    token_bytes = max(0.0, grown / (last.prompt_tokens - first.prompt_tokens))
    more = max(0, context_tokens - last.prompt_tokens)
    return result.available_memory_bytes * MEMORY_SHARE - token_bytes * more
