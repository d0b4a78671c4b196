"""What was measured, as tables for people."""

from collections.abc import Sequence

import msgspec

from toolkit.artifact import Quality
from toolkit.console import Console
from toolkit.quality.details import Range


def show_measures(title: str, quality: Quality, console: Console) -> None:
    """Print every measure with its standard error and its limit."""
    rows = [
        [one.name, _say(one.name, one.value, one.error), _say_limit(one.name, one.limit)]
        for one in quality.measures
    ]
    console.table(title, ["measure", "found", "limit"], rows)


def show_ranges(ranges: Sequence[Range], console: Console) -> None:
    """Print agreement by length, a `range` event each for scripts."""
    rows = []
    for one in ranges:
        console.event("range", **msgspec.to_builtins(one))
        kl, top1 = _say("KL", one.mean_kl, one.kl_error), _say("agreement", one.top1, None)
        found = [kl, top1, _say_agreement(one), _say_yes(one.claimed)]
        rows.append([f"{one.first} to {one.last}", str(one.tokens), *found])
    headers = ["length", "tokens", "mean KL", "top-1", "agrees", "the manifest says so"]
    console.table("agreement by length", headers, rows)


def _say(name: str, value: float, error: float | None) -> str:
    factor, digits, unit = _unit_of(name)
    shown = f"{factor * value:{digits}}"
    return shown + (f" ± {factor * error:{digits}}" if error is not None else "") + unit


def _say_limit(name: str, limit: float | None) -> str:
    factor, _, unit = _unit_of(name)
    return "" if limit is None else f"{factor * limit:g}{unit}"


def _say_agreement(found: Range) -> str:
    return _say_yes(found.agrees) if found.judged else "too short to say"


def _say_yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _unit_of(name: str) -> tuple[float, str, str]:
    """Factor, format and unit in which people read a measure."""
    if name.endswith("Δp"):
        return 1, ".3f", " %"
    if name.endswith("agreement"):
        return 100, ".2f", " %"
    return (1, ".5f", "") if "KL" in name or "perplexity" in name else (1, "g", "")
