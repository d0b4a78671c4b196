"""What answers cost on this machine: time to first token, rates, loading, memory, heat."""

from __future__ import annotations

import dataclasses
import itertools
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .agent.probes.health import read_temperature, read_throttling
from .agent.probes.identity import read_board
from .agent.probes.memory import read_meminfo
from .agent.probes.reading import list_paths, read_number, read_text, run_command
from .answer import count_context
from .failure import Failure
from .loading import Loaded, loading
from .manifest import read_manifest
from .memory import read_available_bytes, read_peak_memory_bytes
from .settings import Settings, read_settings
from .tuning import PROBE_TEXT, judge

SCHEMA = 1
WARM_UP_TOKENS = 4
PROMPTS_TRIED = 3  # where the model ends its answer by itself
ROOT = Path("/")

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Work:
    """What is measured: an answer of `new_tokens` after prompts of each length, `repeat` times.

    `question` (prompt, most tokens of its answer) is asked at the end, to see that answers are
    right. After the first round it ends when less than `floor` tokens/s come (decoding, prompt).
    `is_fresh` leaves the settings that are kept beside the artifact out of it.
    """

    prompt_tokens: tuple[int, ...]
    new_tokens: int
    repeat: int
    question: tuple[str, int] | None = None
    floor: tuple[float, float] = (0.0, 0.0)
    is_fresh: bool = False


def bench(
    artifact: Path, work: Work, given: Mapping[str, int | None], report: Report
) -> dict[str, Any]:
    """Load an artifact once and measure; `given` settings replace those kept beside it.

    Prompts are of the model's own tokens, so lengths are exact, and no two begin with the same
    token, so no cache of earlier prompts helps. Rounds go through all lengths, so that a device
    that grows hot does not make one length slow. Nothing of the first, short answer counts.
    `report` gets `done`, `of`, `words` and, from the second step on, `seconds_left`. Returns what
    `bench --json` prints; Failure when no length fits into the context, or for what loading raises.
    """
    _check(work)
    manifest = read_manifest(artifact)
    if work.is_fresh:
        chosen = {name: value for name, value in given.items() if value is not None}
        settings = Settings(**{"context_tokens": manifest.context_length, **chosen})
    else:
        settings = read_settings(artifact, manifest.context_length, **given)
    started, before = time.time(), read_state()
    with loading(artifact, settings) as loaded:
        lengths, skipped = choose_lengths(loaded, work)
        loaded_bytes = read_peak_memory_bytes()
        runs, peaks = _run_all(loaded, work, lengths, report)
        judged = judge(loaded, *work.question) if work.question else None
        return {
            "schema": SCHEMA,
            "name": manifest.name,
            "engine": loaded.engine,
            "provider": loaded.model.provider,
            "settings": dataclasses.asdict(settings),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "machine": read_machine(),
            "before": before,
            "after": read_state(),
            "new_tokens": work.new_tokens,
            "load_seconds": loaded.load_seconds,
            "loaded_memory_bytes": loaded_bytes,
            "peak_memory_bytes": read_peak_memory_bytes(),
            "available_memory_bytes": read_available_bytes(),
            "lengths": [summarize(n, runs[n], peaks[n]) for n in lengths],
            "skipped": skipped,
            "judged": judged,
        }


def choose_lengths(loaded: Loaded, work: Work) -> tuple[list[int], list[dict[str, Any]]]:
    """Return the lengths that fit into the context, shortest first, and why others do not."""
    highest = count_context(loaded)
    asked = sorted(set(work.prompt_tokens))
    lengths = [length for length in asked if length + work.new_tokens <= highest]
    reason = f"with {work.new_tokens} new tokens it is longer than the context of {highest}"
    skipped = [{"prompt_tokens": n, "reason": reason} for n in asked if n not in lengths]
    if not lengths:
        raise Failure(
            "request",
            f"no prompt length fits: {asked[0]} tokens and {work.new_tokens} new ones are more "
            f"than the context of {highest}",
            "ask for shorter prompts (--prompt-tokens) or fewer tokens (--new-tokens)",
        )
    return lengths, skipped


def make_prompt(text_ids: Sequence[int], length: int, number: int) -> list[int]:
    """Return `length` of a text's tokens, repeated as needed; each number begins with another.

    As far as the text has different tokens: after that the first ones come again.
    """
    starts = [text_ids.index(token) for token in dict.fromkeys(text_ids)]
    start = starts[number % len(starts)]
    return [text_ids[(start + place) % len(text_ids)] for place in range(length)]


def measure_run(loaded: Loaded, prompt_ids: Sequence[int], new_tokens: int) -> dict[str, Any]:
    """Return the costs of one answer; `new_tokens` are those that came, `tokens_per_second` theirs.

    The time to the first token is the prompt's, so the rate counts from there; None of one token.
    `reused_tokens` of the prompt were in the engine's cache; None when it does not say.
    """
    count, started_s = 0, time.perf_counter()
    first_s = last_s = started_s
    stream = loaded.model.generate(list(prompt_ids), new_tokens)
    try:
        for _ in stream:
            last_s = time.perf_counter()
            first_s = first_s if count else last_s
            count += 1
    finally:
        stream.close()
    if not count:
        raise Failure("engine", f"{loaded.engine} answered a prompt with nothing")
    seconds = first_s - started_s
    return {
        "first_token_seconds": seconds,
        "prompt_tokens_per_second": len(prompt_ids) / seconds,
        "tokens_per_second": (count - 1) / (last_s - first_s) if last_s > first_s else None,
        "new_tokens": count,
        "reused_tokens": getattr(loaded.model, "reused_tokens", None),
    }


def summarize(prompt_tokens: int, runs: list[dict[str, Any]], peak_bytes: int) -> dict[str, Any]:
    """Return all runs of a prompt length, and of each measure the median, least and most."""
    spreads = {}
    for name in ("first_token_seconds", "prompt_tokens_per_second", "tokens_per_second"):
        values = [run[name] for run in runs if run[name] is not None]
        spreads[name] = {
            "median": statistics.median(values), "least": min(values), "most": max(values)
        } if values else None  # fmt: skip
    peak = {"peak_memory_bytes": peak_bytes}
    return {"prompt_tokens": prompt_tokens, **spreads, **peak, "runs": runs}


def read_state() -> dict[str, Any]:
    """Return temperature, throttling and clock of this moment; None for what nothing tells."""
    paths = list_paths(ROOT / "sys/devices/system/cpu", "cpu[0-9]*/cpufreq/scaling_cur_freq")
    clocks = [hertz for path in paths if (hertz := read_number(path)) is not None]
    return {
        "temperature_celsius": read_temperature(ROOT),
        **read_throttling(ROOT, run_command),
        "clock_hertz": max(clocks) * 1000 if clocks else None,
    }


def read_machine() -> dict[str, Any]:
    """Return what a reader of the numbers has to know of this machine; no name, no serial."""
    text = read_text(ROOT / "proc/cpuinfo") or ""
    model = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    has_affinity = hasattr(os, "sched_getaffinity")
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "board": read_board(ROOT),
        "processor": model.group(1).strip() if model else platform.processor(),
        "cpu_count": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        "memory_total_bytes": read_meminfo(ROOT).get("MemTotal"),
        "python": platform.python_version(),
    }


def _run_all(
    loaded: Loaded, work: Work, lengths: list[int], report: Report
) -> tuple[dict[int, list[dict[str, Any]]], dict[int, int]]:
    """Return the runs by length, and the most memory there was after the first of each."""
    text_ids = list(loaded.model.encode(PROBE_TEXT))
    runs: dict[int, list[dict[str, Any]]] = {length: [] for length in lengths}
    peaks: dict[int, int] = {}
    progress = _Progress(report, lengths, work)
    measure_run(loaded, make_prompt(text_ids, lengths[0], 0), min(WARM_UP_TOKENS, work.new_tokens))
    numbers = itertools.count(1)
    for turn in range(work.repeat):
        for length in lengths:
            progress.tell(f"{length} tokens, {turn + 1} of {work.repeat}")
            prompts = (make_prompt(text_ids, length, number) for number in numbers)
            runs[length].append(_measure_whole(loaded, prompts, work.new_tokens))
            peaks.setdefault(length, read_peak_memory_bytes())
            progress.advance(length)
        if _is_hopeless(runs[lengths[-1]][0], work.floor):
            break
    return runs, peaks


def _measure_whole(loaded: Loaded, prompts: Iterator[list[int]], new_tokens: int) -> dict[str, Any]:
    """Return the first run with all tokens; where the model ends each time, the longest."""
    runs = []
    for prompt_ids in itertools.islice(prompts, PROMPTS_TRIED):
        runs.append(measure_run(loaded, prompt_ids, new_tokens))
        if runs[-1]["new_tokens"] >= new_tokens:
            break
    return max(runs, key=lambda run: int(run["new_tokens"]))


def _is_hopeless(run: dict[str, Any], floor: tuple[float, float]) -> bool:
    decode, prompt = floor
    return (run["tokens_per_second"] or 0.0) < decode or run["prompt_tokens_per_second"] < prompt


class _Progress:
    """Tells how far it is; the time left is counted in tokens, as the first round showed them."""

    def __init__(self, report: Report, lengths: list[int], work: Work) -> None:
        self._report, self._of = report, len(lengths) * work.repeat
        self._seconds: dict[int, float] = {}
        self._left = lengths * work.repeat
        self._done, self._started_s = 0, time.monotonic()

    def tell(self, words: str) -> None:
        told: dict[str, Any] = {"done": self._done, "of": self._of, "words": words}
        if self._seconds:
            told["seconds_left"] = sum(self._estimate(length) for length in self._left)
        self._report(told)
        self._started_s = time.monotonic()

    def _estimate(self, length: int) -> float:
        """As it was; a length that is yet to come takes its share more than the longest so far."""
        longest = max(self._seconds)
        return self._seconds.get(length, self._seconds[longest] * length / longest)

    def advance(self, length: int) -> None:
        self._seconds[length] = time.monotonic() - self._started_s
        self._left.remove(length)
        self._done += 1


def _check(work: Work) -> None:
    numbers = {"prompt length": min(work.prompt_tokens, default=0), "repeat": work.repeat}
    for name, number in {**numbers, "new tokens": work.new_tokens}.items():
        if number < 1:
            raise Failure("request", f"{name} is {number}; allowed are whole numbers from 1")
