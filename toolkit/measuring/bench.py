"""Measure an artifact here or on a device, and show what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from toolkit.console import Console, format_bytes
from toolkit.errors import BuildError
from toolkit.measuring.result import Length, Result, Run, Spread, State, convert_result
from toolkit.place import Place

TIMEOUT_S = 6 * 3600.0
BAR_CELLS = 10
EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class Work:
    """What to measure; `settings` replace those that are kept beside the artifact."""

    prompt_tokens: tuple[int, ...]
    new_tokens: int
    repeat: int
    settings: dict[str, int | None] = field(default_factory=dict)


def bench(
    place: Place, work: Work, console: Console, label: str = "", more: Sequence[str] = ()
) -> Result:
    """Measure where the artifact lies; `more` goes to the runner as it is.

    RunnerError says how the runner ended otherwise.
    """
    arguments = [
        *("bench", "--json", "--prompt-tokens", ",".join(map(str, work.prompt_tokens))),
        *("--new-tokens", str(work.new_tokens), "--repeat", str(work.repeat)),
        *more,
    ]
    for name, value in work.settings.items():
        if value is not None:
            arguments += ["--" + name.replace("_", "-"), str(value)]
    with console.waiting(label or f"bench {place.name}") as tell:
        found = place.run(
            arguments, timeout_s=TIMEOUT_S, take_progress=lambda told: tell(describe_progress(told))
        )
    return convert_result(found, place.name)


def describe_progress(told: dict[str, Any]) -> str:
    """The words of a runner's progress with the time left."""
    left = told.get("seconds_left")
    share = f"{told.get('done', 0) + 1}/{told.get('of', 1)}"
    return f"{share}, {told.get('words', '')}" + (f", {format_time(left)} left" if left else "")


def show_results(results: Sequence[Result], console: Console) -> None:
    """Show one result, or several side by side, as a table with bars."""
    for result in results:
        console.event("bench", **msgspec.to_builtins(result))
    marks = [chr(ord("A") + number) for number in range(len(results))] if results[1:] else [""]
    highest = max((_rate(length) for r in results for length in r.lengths), default=0.0)
    rows = [
        [
            f"{mark} {length.prompt_tokens}".strip(),
            _show_spread(length.first_token_seconds, " s"),
            _show_spread(length.prompt_tokens_per_second),
            _show_spread(length.tokens_per_second),
            _draw_bar(_rate(length), highest),
        ]
        for mark, result in zip(marks, results, strict=True)
        for length in result.lengths
    ]
    headers = ["prompt", "first token after", "prompt tokens/s", "tokens/s", ""]
    console.table("median (least to most)", headers, rows)
    for mark, result in zip(marks, results, strict=True):
        title = f"{mark}: {result.title}" if mark else result.title
        console.table(title, ["", ""], describe(result))


def describe(result: Result) -> list[list[str]]:
    """What else was found, as rows of name and value."""
    settings = ", ".join(f"{name} {n}" for name, n in result.settings.items() if n is not None)
    rows = [
        ["engine", f"{result.engine} on {result.provider}"],
        ["machine", _describe_machine(result)],
        ["settings", settings],
        ["loaded in", format_time(result.load_seconds)],
        ["peak memory", format_bytes(result.peak_memory_bytes)],
        *describe_states(result.before, result.after),
    ]
    rows += [[f"not {s.prompt_tokens} tokens", s.reason] for s in result.skipped]
    short = [(length, run) for length in result.lengths for run in length.runs]
    made = [_say_short(length, run) for length, run in short if run.new_tokens < result.new_tokens]
    return rows + ([["ended early", "; ".join(made)]] if made else [])


def describe_states(before: State, after: State) -> list[list[str]]:
    """Temperature, clock and throttling before and after, as far as the machine tells."""
    rows = []
    if before.temperature_celsius is not None and after.temperature_celsius is not None:
        heat = f"{before.temperature_celsius:.0f} to {after.temperature_celsius:.0f} °C"
        rows.append(["temperature", heat])
    if before.clock_hertz and after.clock_hertz:
        rows.append(
            ["clock", f"{before.clock_hertz / 1e9:.2f} to {after.clock_hertz / 1e9:.2f} GHz"]
        )
    if before.throttled_now is not None and after.throttled_now is not None:
        texts = [", ".join(names) or "no" for names in (before.throttled_now, after.throttled_now)]
        rows.append(["throttled", f"before: {texts[0]}; after: {texts[1]}"])
    return rows


def write_result(result: Result, path: Path) -> None:
    """Write a result as JSON; BuildError when that fails."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    except OSError as error:
        raise BuildError(f"{path}: cannot be written: {error.strerror}") from None


def format_time(seconds: float) -> str:
    """Format a duration: 0.0123 -> '12 ms', 75 -> '1:15'."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rate(length: Length) -> float:
    return length.tokens_per_second.median if length.tokens_per_second else 0.0


def _show_spread(spread: Spread | None, unit: str = "") -> str:
    if spread is None:
        return "one token only"
    digits = (
        3 if spread.median < 1 else 2 if spread.median < 10 else 1 if spread.median < 100 else 0
    )
    values = (spread.median, spread.least, spread.most)
    median, least, most = (f"{value:.{digits}f}" for value in values)
    return f"{median}{unit} ({least} to {most})"


def _draw_bar(rate: float, highest: float) -> str:
    """A bar of at most BAR_CELLS cells, drawn to an eighth of a cell."""
    eighths = round(8 * BAR_CELLS * rate / highest) if highest else 0
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).strip()


def _describe_machine(result: Result) -> str:
    machine = result.machine
    texts = [machine.board, machine.processor, f"{machine.cpu_count} cores"]
    if machine.memory_total_bytes:
        texts.append(f"{format_bytes(machine.memory_total_bytes)} of memory")
    return ", ".join(text for text in texts if text)


def _say_short(length: Length, run: Run) -> str:
    return f"after {length.prompt_tokens} tokens the engine made only {run.new_tokens}"
