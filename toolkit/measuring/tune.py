"""Find the settings with which an artifact answers fastest where it lies, and keep them there."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

from toolkit.artifact import Smoke
from toolkit.console import Console, format_bytes
from toolkit.errors import RunnerError, SettingsError, SmokeError
from toolkit.measuring import space
from toolkit.measuring.bench import Work, bench, format_time
from toolkit.measuring.result import Result
from toolkit.measuring.space import Knob, Settings
from toolkit.place import Place
from toolkit.smoke import contains, quote

LARGEST = 0


@dataclass(frozen=True)
class Wish:
    """What is to become good; `context_tokens` None keeps the artifact's own, LARGEST searches."""

    goal: str = "decode"
    context_tokens: int | None = None
    prompt_tokens: tuple[int, ...] = (64, 512)
    new_tokens: int = 48
    repeat: int = 3
    smoke: Smoke | None = None


@dataclass
class Try:
    """One child process with settings of its own, and what came of it."""

    settings: Settings
    result: Result | None = None
    verdict: str = ""


@dataclass
class Search:
    """A search under way: the best so far, and every try."""

    place: Place
    wish: Wish
    console: Console
    smoke: Smoke | None
    expected: int
    tries: list[Try] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)

    def run(
        self, settings: Settings, label: str, *, floor: float = 0.0, is_asked: bool = False
    ) -> Try:
        """Measure settings in a process of their own; its end is no more than a bad try."""
        wish, tried = self.wish, Try(settings)
        decode, prompt = {"decode": (floor, 0.0), "prompt": (0.0, floor)}.get(wish.goal, (0, 0))
        more = ["--fresh", "--floor", str(decode), str(prompt)]
        if self.smoke and is_asked:
            more += ["--ask", self.smoke.prompt, "--ask-tokens", str(self.smoke.max_tokens)]
        work = Work(wish.prompt_tokens, wish.new_tokens, wish.repeat, settings)
        label = self._say(label)
        self.tries.append(tried)
        try:
            tried.result = bench(self.place, work, self.console, label, more)
        except RunnerError as error:
            tried.verdict = f"failed: {error}"
        self.console.event("try", settings=settings, **_measures(tried.result))
        return tried

    def score(self, tried: Try) -> float:
        """How good a try is for the goal; 0 when it failed."""
        return space.score(tried.result, self.wish.goal) if tried.result else 0.0

    def _say(self, label: str) -> str:
        done = len(self.tries)
        if not done:
            return f"tune {self.place.name}: {label}"
        left_s = (time.monotonic() - self.started_s) / done * max(1, self.expected - done)
        share = f"{done + 1} of at most {self.expected}"
        return f"tune {self.place.name}: {label} ({share}, {format_time(left_s)} left)"


def tune(place: Place, wish: Wish, console: Console, *, is_dry: bool = False) -> None:
    """Search, show every try, let the winner answer the smoke question, and keep it there.

    One setting after the other, each try in a fresh process on the device. Raises SmokeError when
    not even the engine's own settings answer rightly, RunnerError when they do not run at all;
    what was kept before stays then.
    """
    _check_context(place, wish)
    info = place.run(["info", "--json"])
    context = wish.context_tokens or place.manifest.context_length
    knobs = space.list_knobs(
        wish.goal, info["offered"], info["machine"]["cpu_count"] or 1, context
    )  # fmt: skip
    smoke = wish.smoke or place.manifest.smoke
    if smoke is None:  # nothing would show that answers stay right
        knobs = [knob for knob in knobs if knob.name != "kv_bits"]
    contexts = _list_contexts(place, wish)
    _show_space(place, knobs, contexts, smoke, console)
    if is_dry:
        return
    confirming = 2 if knobs else 0
    expected = 1 + sum(len(knob.values) for knob in knobs) + len(contexts) + confirming
    search = Search(place, wish, console, smoke, expected)
    first = _start(search)
    best = first
    for knob in knobs:
        best = _turn(search, knob, best, first)
    winner, default = _confirm(search, best, first)
    winner = _stretch(search, contexts, winner, first)
    _show_tries(search, winner, console)
    agreement = _agree(winner, first)
    _keep(search, winner, default, agreement, console)


def _check_context(place: Place, wish: Wish) -> None:
    """Refuse a context that could not be kept, before hours are spent on it."""
    lowest, highest = place.manifest.valid_context
    if wish.context_tokens and not lowest <= wish.context_tokens <= highest:
        raise SettingsError(
            f"{place.name}: a context of {wish.context_tokens} tokens; its artifact agrees with "
            f"its source at {lowest} to {highest}",
            advice="choose one of those, or `largest`",
        )


def reset(place: Place, console: Console) -> None:
    """Forget the settings that are kept, so that the engine's own hold."""
    _store(place, {}, {})
    console.result(f"{place.name}: the engine's own settings hold again")


def _start(search: Search) -> Try:
    """The engine's own settings, against which everything is compared."""
    context = search.wish.context_tokens or search.place.manifest.context_length
    default = search.run({"context_tokens": context}, "the engine's own settings", is_asked=True)
    if default.result is None:
        raise RunnerError(default.verdict.removeprefix("failed: "))
    _check_answer(search, default)
    default.verdict = "the engine's own"
    return default


def _turn(search: Search, knob: Knob, best: Try, default: Try) -> Try:
    """Try one setting's values on top of the best so far, until two in a row are clearly worse."""
    worse, start = 0, best.settings
    for value in knob.values:
        tried = search.run(
            {**start, knob.name: value}, f"{knob.name} {value}",
            floor=search.score(best) * space.CLEARLY_WORSE, is_asked=knob.name == "kv_bits",
        )  # fmt: skip
        if tried.result is None:
            continue
        ratio = search.score(tried) / search.score(best)
        tried.verdict = _judge(search, tried, default) or f"{ratio:.2f} times the best before"
        if ratio > space.MARGIN and _is_right(search, tried, default):
            best = tried
        worse = worse + 1 if ratio < space.CLEARLY_WORSE else 0
        if worse == 2:
            break
    return best


def _confirm(search: Search, best: Try, first: Try) -> tuple[Try, Try]:
    """Measure the default and the best once more, and return the winner and the default.

    The best of many tries is partly luck; only what wins again, and answers rightly, is kept.
    """
    if best is first:
        return first, first
    default = search.run(first.settings, "the engine's own settings, again")
    again = search.run(best.settings, "the best, again", is_asked=True)
    if again.result is None or default.result is None:
        return first, first
    ratio = search.score(again) / search.score(default)
    default.verdict = "the engine's own, again"
    again.verdict = _judge(search, again, first) or f"{ratio:.2f} times the engine's own"
    if ratio > space.MARGIN and _is_right(search, again, first):
        return again, default
    again.verdict += ", so not kept"
    return default, default


def _stretch(search: Search, contexts: list[int], best: Try, default: Try) -> Try:
    """The longest context that loads and leaves memory for its cache, with the best settings."""
    for context in contexts:
        settings = {**best.settings, "context_tokens": context}
        tried = search.run(settings, f"context {context}", is_asked=True)
        if tried.result is None:
            continue
        free = space.estimate_free_bytes(tried.result, context)
        tried.verdict = _judge(search, tried, default)
        if free is not None and free < 0:
            tried.verdict = f"lacks {format_bytes(-free)} of memory"
        if not tried.verdict:
            return tried
    return best


def _is_right(search: Search, tried: Try, default: Try) -> bool:
    return not _judge(search, tried, default)


def _judge(search: Search, tried: Try, default: Try) -> str:
    """Why a try may not win, empty when it may: its answers have to stay right."""
    try:
        _check_answer(search, tried)
    except SmokeError as error:
        return str(error)
    if tried.settings.get("kv_bits") is None or not (tried.result and default.result):
        return ""
    agreement = space.measure_agreement(tried.result, default.result)
    if agreement is not None and agreement < space.AGREEMENT:
        return f"other tokens: {agreement:.0%} agree, {space.AGREEMENT:.0%} are asked for"
    return ""


def _check_answer(search: Search, tried: Try) -> None:
    """Raise SmokeError unless the answer contains what is expected."""
    if search.smoke is None or tried.result is None or tried.result.judged is None:
        return
    text = tried.result.judged.text
    if not contains(text, search.smoke.expect):
        raise SmokeError(
            f"{search.place.name}: asked {quote(search.smoke.prompt)}, it answered {quote(text)}; "
            f"expected {quote(search.smoke.expect)} in it",
            advice="check the artifact: phiship check ARTIFACT",
        )


def _agree(winner: Try, first: Try) -> float | None:
    if winner.result is None or first.result is None:
        return None
    return space.measure_agreement(winner.result, first.result)


def _keep(
    search: Search, best: Try, default: Try, agreement: float | None, console: Console
) -> None:
    """Store the winner with what was measured; what the artifact has anyway is left out."""
    own = search.place.manifest.context_length
    settings = {
        name: value for name, value in best.settings.items()
        if value is not None and (name, value) != ("context_tokens", own)
    }  # fmt: skip
    measured = {
        "goal": search.wish.goal, "tries": len(search.tries), "agreement": agreement,
        "winner": _measures(best.result), "default": _measures(default.result),
    }  # fmt: skip
    _store(search.place, settings, measured)
    console.event("tuned", place=search.place.name, settings=settings, measured=measured)
    gain = search.score(best) / search.score(default)
    what = ", ".join(f"{name} {value}" for name, value in settings.items())
    kept = f"keeps {what}" if settings else "keeps the engine's own settings"
    console.result(f"{search.place.name}: {kept}; {search.wish.goal} {gain:.2f} times the default")
    if search.smoke is None:
        console.note("no smoke question: nobody looked whether the winner's answers are right")


def _store(place: Place, settings: dict[str, Any], measured: dict[str, Any]) -> None:
    place.run(["settings", "--json"], json.dumps({"settings": settings, "measured": measured}))


def _measures(result: Result | None) -> dict[str, Any]:
    if result is None:
        return {}
    return {
        "tokens_per_second": space.rate(result, "decode"),
        "prompt_tokens_per_second": space.rate(result, "prompt"),
        "peak_memory_bytes": result.peak_memory_bytes,
        "started": result.started,
        "engine": result.engine,
    }


def _list_contexts(place: Place, wish: Wish) -> list[int]:
    if wish.context_tokens != LARGEST:
        return []
    own, highest = place.manifest.context_length, place.manifest.valid_context[1]
    return [context for context in space.list_contexts(own, highest) if context > own]


def _show_space(
    place: Place, knobs: list[Knob], contexts: list[int], smoke: Smoke | None, console: Console
) -> None:
    spaces = {knob.name: knob.values for knob in knobs}
    if contexts:
        spaces["context_tokens"] = tuple(contexts)
    console.event("space", place=place.name, **spaces)
    rows = [[name, ", ".join(map(str, values))] for name, values in spaces.items()]
    console.table(f"tune {place.name}: tried one after the other", ["setting", "values"], rows)
    if not spaces:
        console.note(f"{place.manifest.runtime.package} offers nothing that could be tuned for it")
    if smoke is None:
        console.note("no smoke question (--prompt, --expect): kv_bits stays as it is")


def _show_tries(search: Search, best: Try, console: Console) -> None:
    rows, first = [], search.tries[0].settings
    for tried in search.tries:
        changed = {name: n for name, n in tried.settings.items() if first.get(name) != n}
        text = ", ".join(f"{name} {value}" for name, value in changed.items()) or "none"
        verdict = f"kept: {tried.verdict}".rstrip(": ") if tried is best else tried.verdict
        if tried.result is None:
            rows.append([text, "", "", "", verdict])
            continue
        rates = (space.rate(tried.result, "decode"), space.rate(tried.result, "prompt"))
        cells = [*(f"{rate:.1f}" for rate in rates), format_bytes(tried.result.peak_memory_bytes)]
        rows.append([text, *cells, verdict])
    headers = ["settings", "tokens/s", "prompt tokens/s", "peak memory", ""]
    console.table(f"tune {search.place.name} for {search.wish.goal}", headers, rows)
