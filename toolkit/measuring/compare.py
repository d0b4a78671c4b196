"""Ask several sides the same, and show what they answer side by side."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.console import Console
from toolkit.endpoint import Endpoint, chat
from toolkit.errors import PhishipError, RunnerError
from toolkit.measuring.agreement import Agreement, measure
from toolkit.measuring.bench import format_time
from toolkit.measuring.prompts import Prompt
from toolkit.measuring.sides import Answer, Side, opening
from toolkit.runner.chatting import clean

SHOWN_CHARACTERS = 800


@dataclass(frozen=True)
class Asking:
    """How every side is asked; `timeout_s` bounds each answer."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = None
    timeout_s: float = 600.0


@dataclass(frozen=True)
class Comparison:
    """All answers, and how much each two sides agree."""

    prompts: tuple[Prompt, ...]
    sides: tuple[Side, ...]
    asking: Asking

    @property
    def agreements(self) -> list[Agreement]:
        """Of each two sides that have answers to the same prompts."""
        found = []
        for one, other in itertools.combinations(self.sides, 2):
            texts = [(a.text, b.text) for a, b in zip(one.answers, other.answers, strict=False)]
            pairs = [(a, b) for a, b in texts if a is not None and b is not None]
            agreement = measure(one.letter, other.letter, pairs)
            found += [agreement] if agreement else []
        return found

    def raise_failure(self) -> None:
        """Raise the first side's error, or say which answers are missing."""
        for side in self.sides:
            if side.error:
                raise side.error
        missing = [(s, answer) for s in self.sides for answer in s.answers if answer.failure]
        if missing:
            side, answer = missing[0]
            raise RunnerError(
                f"{len(missing)} answers are missing; the first is of {side.letter}, "
                f"{side.title}: {answer.failure}"
            )


def compare(
    sides: Sequence[Side], prompts: tuple[Prompt, ...], asking: Asking, console: Console,
    devices_file: Path | None = None,
) -> Comparison:  # fmt: skip
    """Ask one side after the other, so that one model is in memory at a time.

    A side that fails keeps its error, and the others are asked all the same.
    """
    for side in sides:
        with console.waiting(f"{side.letter}: {side.title}") as tell:
            try:
                with opening(side, devices_file) as endpoint:
                    for number, prompt in enumerate(prompts, 1):
                        tell(f"{number}/{len(prompts)}")
                        side.answers.append(_ask(endpoint, prompt, asking))
            except PhishipError as error:
                side.error = error
        side.answers += [Answer() for _ in range(len(prompts) - len(side.answers))]
    return Comparison(prompts, tuple(sides), asking)


def _ask(endpoint: Endpoint, prompt: Prompt, asking: Asking) -> Answer:
    """An answer, or why this prompt has none; what would fail for every prompt is raised."""
    try:
        reply = chat(
            endpoint, prompt.messages, max_tokens=asking.max_tokens,
            temperature=asking.temperature, seed=asking.seed, timeout_s=asking.timeout_s,
        )  # fmt: skip
    except RunnerError as error:
        return Answer(failure=str(error))
    return Answer(reply)


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Show answers side by side, then the measures of sides and pairs."""
    for event, fields in list_events(comparison):
        console.event(event, **fields)
    headers = ["", *(f"{side.letter}: {side.title}" for side in comparison.sides)]
    rows = [
        [clean(prompt.title), *(_show_answer(side, number) for side in comparison.sides)]
        for number, prompt in enumerate(comparison.prompts)
    ]
    console.table("answers", headers, rows)
    console.table("sides", ["", *SIDE_HEADERS], [_list_side(side) for side in comparison.sides])
    pairs = [list_pair(agreement) for agreement in comparison.agreements]
    console.table("agreement", PAIR_HEADERS, pairs)


SIDE_HEADERS = ("answers", "tokens", "time", "tokens/s", "ended")
PAIR_HEADERS = ("", "same words", "similarity", "first difference", "length")


def list_side(side: Side, prompts: int) -> list[str]:
    """Return what a side took, as SIDE_HEADERS say."""
    if not side.replies:
        return [f"0 of {prompts}", "", "", "", f"failed: {side.error}" if side.error else "failed"]
    rate = side.tokens_per_second
    failed = {"failed": prompts - len(side.replies)} if len(side.replies) < prompts else {}
    counts = {**side.finish_reasons, **failed}
    ended = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    return [
        f"{len(side.replies)} of {prompts}",
        "not told" if side.tokens is None else str(side.tokens),
        format_time(side.seconds),
        f"{rate:.1f}" if rate else "",
        f"failed: {side.error}" if side.error else clean(ended),
    ]


def list_pair(agreement: Agreement) -> list[str]:
    """Return how much a pair agrees, as PAIR_HEADERS say."""
    place, ratio = agreement.first_difference, agreement.length_ratio
    return [
        f"{agreement.first} and {agreement.second}",
        f"{agreement.exact_rate:.0%} of {agreement.prompts}",
        f"{agreement.similarity:.2f}",
        "none" if place is None else f"word {place:g}",
        "" if ratio is None else f"{ratio:.2f} times",
    ]


def list_events(comparison: Comparison) -> list[tuple[str, dict[str, Any]]]:
    """Return the events of --json: every answer, every side, every pair."""
    events: list[tuple[str, dict[str, Any]]] = []
    for number, prompt in enumerate(comparison.prompts):
        for side in comparison.sides:
            answer = side.answers[number]
            reply = dataclasses.asdict(answer.reply) if answer.reply else {}
            named = {"side": side.letter, "prompt": number, "messages": list(prompt.messages)}
            events.append(("answer", {**named, **reply, "failure": answer.failure}))
    events += [("side", _describe_side(side)) for side in comparison.sides]
    return [*events, *(("agreement", dataclasses.asdict(one)) for one in comparison.agreements)]


def _describe_side(side: Side) -> dict[str, Any]:
    return {
        "side": side.letter,
        "title": side.title,
        "answers": len(side.replies),
        "tokens": side.tokens,
        "seconds": side.seconds,
        "tokens_per_second": side.tokens_per_second,
        "finish_reasons": side.finish_reasons,
        "error": str(side.error) if side.error else None,
    }


def _list_side(side: Side) -> list[str]:
    return [f"{side.letter}: {side.title}", *list_side(side, len(side.answers))]


def _show_answer(side: Side, number: int) -> str:
    answer = side.answers[number]
    if answer.text is None:
        return f"failed: {answer.failure}" if answer.failure else "failed, see below"
    text = clean(answer.text)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."
