"""Asking a release on a device, and judging its answer: before the switch, and after it."""

from collections.abc import Sequence
from typing import Any

import msgspec

from toolkit.artifact import Smoke
from toolkit.console import format_bytes
from toolkit.device import Health
from toolkit.errors import RunnerError, SmokeError
from toolkit.ssh.session import Session, TakeProgress

ANSWER_TIMEOUT_S = 900
SHOWN_CHARACTERS = 300
CURRENT = "current"


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the runner says of one answer; rates and times are the device's own."""

    text: str
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float
    first_token_seconds: float
    load_seconds: float
    peak_memory_bytes: int
    provider: str
    engine: str
    stop_reason: str
    token_ids: tuple[int, ...]

    def describe(self) -> str:
        """Text, rates and memory, for the report."""
        return (
            f"{quote(self.text)}, {self.tokens_per_second:.1f} tokens/s, "
            f"loaded in {self.load_seconds:.1f} s, peak {format_bytes(self.peak_memory_bytes)}, "
            f"{self.engine} on {self.provider}"
        )


def ask(session: Session, release: str, smoke: Smoke) -> Answer:
    """Run a release's own runner on the device; RunnerError says how it ended otherwise."""
    arguments = ["generate", "--json", "--max-tokens", str(smoke.max_tokens)]
    answer = run_there(session, release, arguments, smoke.prompt, ANSWER_TIMEOUT_S)
    return msgspec.convert(answer, Answer)


def run_there(
    session: Session,
    release: str,
    arguments: Sequence[str],
    stdin: str,
    timeout_s: float,
    take_progress: TakeProgress | None = None,
) -> dict[str, Any]:
    """Run a release's own runner on the device; returns the JSON of its last line.

    `take_progress` gets what it says on the way. RunnerError says how it ended otherwise.
    """
    done = session.call(
        "run", release=release, arguments=list(arguments), stdin=stdin, timeout_s=timeout_s,
        take_progress=take_progress,
    )  # fmt: skip
    return read_answer(session.device.name, done)


def read_answer(name: str, done: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of a runner that has ended; RunnerError when it failed."""
    answer: dict[str, Any] | None = done["answer"]
    if answer is None or "error" in answer or done["code"] != 0:
        raise _explain_crash(name, done)
    return answer


def check_answer(device: str, answer: Answer, smoke: Smoke) -> None:
    """Raise SmokeError unless the answer contains what is expected; case, spaces do not count."""
    if not contains(answer.text, smoke.expect):
        expected = f"{quote(smoke.expect)} in it" if smoke.expect else "any text"
        raise SmokeError(
            f"{device}: asked {quote(smoke.prompt)}, it answered {quote(answer.text)}; expected "
            f"{expected}",
            advice="the release in use was not touched; check the artifact: phiship check ARTIFACT",
        )


def check_health(
    device: str, answer: Answer, staged: Answer, limits: Health, throttled: tuple[str, ...]
) -> None:
    """Raise SmokeError unless the release in use answers as it did when staged, within limits."""
    if answer.token_ids != staged.token_ids:
        raise SmokeError(
            f"{device}: in use it answers {quote(answer.text)}; staged it had answered "
            f"{quote(staged.text)}"
        )
    floor = limits.min_tokens_per_second
    if floor is not None and answer.tokens_per_second < floor:
        raise SmokeError(
            f"{device}: {answer.tokens_per_second:.2f} tokens/s; at least {floor:g} are asked for",
            advice="give it fewer bits or a faster engine, or lower min_tokens_per_second",
        )
    ceiling = limits.max_memory
    if ceiling is not None and answer.peak_memory_bytes > ceiling:
        raise SmokeError(
            f"{device}: the runner took {format_bytes(answer.peak_memory_bytes)} of memory; "
            f"{format_bytes(ceiling)} are allowed",
            advice="shorten the context or use fewer bits, or raise max_memory",
        )
    if limits.refuse_throttling and throttled:
        raise SmokeError(
            f"{device}: it is throttled while it answers: {', '.join(throttled)}",
            advice="give it a stronger power supply or better cooling",
        )


def describe_limits(smoke: Smoke, limits: Health) -> str:
    """The limits of the health gate, for the report."""
    texts = [describe(smoke), "as staged"]
    if limits.min_tokens_per_second is not None:
        texts.append(f"at least {limits.min_tokens_per_second:g} tokens/s")
    if limits.max_memory is not None:
        texts.append(f"at most {format_bytes(limits.max_memory)}")
    if limits.refuse_throttling:
        texts.append("not throttled")
    return ", ".join(texts)


def quote(text: str) -> str:
    """Quote a model's or a device's words; nothing in them can steer a terminal."""
    shown = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
    return repr(shown)


def contains(text: str, expected: str) -> bool:
    """Whether a text contains another; case and white space do not count.

    Where nothing is expected, whether there is any text.
    """
    found = _normalize(text)
    return _normalize(expected) in found if expected else bool(found)


def describe(smoke: Smoke) -> str:
    """What an answer has to contain, for the report."""
    return f"contains {quote(smoke.expect)}" if smoke.expect else "any answer"


def _normalize(text: str) -> str:
    return " ".join(text.casefold().split())


def _explain_crash(device: str, done: dict[str, Any]) -> RunnerError:
    error = (done["answer"] or {}).get("error")
    if error:
        return RunnerError(f"{device}: {error['message']}", advice=error["advice"])
    if done["timeout_s"]:
        ended = f"gave no answer within {done['timeout_s']:.0f} s"
    else:
        ended = f"was killed by {done['signal']}" if done["signal"] else f"ended: {done['code']}"
    tail = quote(done["stderr"].strip()[-SHOWN_CHARACTERS:].replace("\n", " | "))
    advice = {
        "SIGKILL": "the device probably ran out of memory: shorten the context, or use fewer bits",
        "SIGILL": "the runtime's wheel uses instructions this processor lacks: try another version",
    }
    return RunnerError(
        f"{device}: the runner {ended}; its last words: {tail}",
        advice=advice.get(done["signal"], "try the same artifact on this machine"),
    )
