"""Who `compare` asks: an artifact here, a device, or an OpenAI-compatible endpoint."""

import os
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from toolkit.endpoint import Endpoint, Reply
from toolkit.errors import PhishipError, SettingsError
from toolkit.place import open_place

KEY_VARIABLE = "PHISHIP_API_KEY"
LETTERS = "ABCDEFGHIJ"


@dataclass
class Answer:
    """What a side said to one prompt, or why it said nothing."""

    reply: Reply | None = None
    failure: str = ""

    @property
    def text(self) -> str | None:
        """The answer without white space around it; None when there is none."""
        return self.reply.text.strip() if self.reply else None


@dataclass
class Side:
    """One of those that are asked; `error` ended its turn."""

    letter: str
    text: str
    endpoint: Endpoint | None = None
    answers: list[Answer] = field(default_factory=list)
    error: PhishipError | None = None

    @property
    def title(self) -> str:
        """Its name for people; of an address no more than host and model."""
        if self.endpoint:
            return f"{self.endpoint.model} at {self.endpoint.host}"
        return Path(self.text).name

    @property
    def replies(self) -> list[Reply]:
        """The answers that came."""
        return [answer.reply for answer in self.answers if answer.reply]

    @property
    def tokens(self) -> int | None:
        """Tokens of all answers; None when the server does not count them."""
        counts = [reply.completion_tokens for reply in self.replies]
        return (
            sum(count for count in counts if count) if all(c is not None for c in counts) else None
        )

    @property
    def seconds(self) -> float:
        """Time that its answers took, prompts and the network included."""
        return sum(reply.seconds for reply in self.replies)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all answers by their time, as seen from here."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    @property
    def finish_reasons(self) -> dict[str, int]:
        """How often its answers ended for which reason."""
        reasons = [reply.finish_reason or "unsaid" for reply in self.replies]
        return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def make_sides(texts: Sequence[str], key_variables: Sequence[str]) -> list[Side]:
    """Return the sides, each endpoint with its key; SettingsError for what cannot be asked.

    `key_variables` are NAME or SIDE=NAME, SIDE a letter from A on.
    """
    if not 2 <= len(texts) <= len(LETTERS):
        raise SettingsError(f"{len(texts)} sides; allowed are 2 to {len(LETTERS)}")
    sides = [Side(letter, text) for letter, text in zip(LETTERS, texts, strict=False)]
    for side in sides:
        if "://" in side.text:
            side.endpoint = parse_endpoint(side.text)
    _add_keys({side.letter: side for side in sides if side.endpoint}, key_variables)
    return sides


def parse_endpoint(text: str) -> Endpoint:
    """Read URL#MODEL; SettingsError when it is none. The key is not part of it."""
    address, _, model = text.partition("#")
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError:  # half a bracket of an IPv6 address
        parts = urllib.parse.SplitResult("", "", "", "", "")
    if parts.scheme not in ("http", "https") or not parts.hostname or not model:
        raise SettingsError(
            f"{text!r} is no endpoint",
            advice="write BASE_URL#MODEL, such as http://127.0.0.1:8080/v1#phi-3-mini",
        )
    if parts.username or parts.password:
        raise SettingsError(
            f"the address of {parts.hostname} holds a user or a password",
            advice=f"put the key into the environment variable {KEY_VARIABLE}",
        )
    return Endpoint(address, model)


def add_key(endpoint: Endpoint, variable: str) -> Endpoint:
    """Return the endpoint with the key that an environment variable holds; SettingsError without.

    A key is only ever sent over https, or to this machine itself.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise SettingsError(
            f"{endpoint.host}: the environment variable {variable} holds no key",
            advice=f"put the key there: export {variable}=...",
        )
    if not key.isascii() or not key.isprintable():
        raise SettingsError(f"{endpoint.host}: {variable} holds what no key can be")
    if not endpoint.is_local and not endpoint.base_url.startswith("https:"):
        raise SettingsError(
            f"{endpoint.base_url}: a key would go over the network as plain text",
            advice="use https, or an SSH tunnel to that server",
        )
    return replace(endpoint, key=key)


@contextmanager
def opening(side: Side, devices_file: Path | None) -> Iterator[Endpoint]:
    """Yield where a side is asked; an artifact or a device serves for the length of the block."""
    if side.endpoint:
        yield side.endpoint
        return
    with open_place(side.text, devices_file) as place, place.serving() as endpoint:
        yield endpoint


def _add_keys(sides: dict[str, Side], key_variables: Sequence[str]) -> None:
    named, common = _split_variables(sides, key_variables)
    for letter, variable in named.items():
        _give(sides[letter], variable)
    # A key of one provider is nothing that another should see.
    rest = [s for letter, s in sides.items() if letter not in named and _is_remote(s)]
    hosts = {side.endpoint.host for side in rest if side.endpoint}
    variable = common or (KEY_VARIABLE if os.environ.get(KEY_VARIABLE) else "")
    if variable and len(hosts) > 1:
        raise SettingsError(
            f"{variable} would go to several servers: {', '.join(sorted(hosts))}",
            advice="say whose it is: --key-env A=NAME --key-env B=NAME",
        )
    for side in rest:
        if variable:
            _give(side, variable)


def _split_variables(
    sides: dict[str, Side], key_variables: Sequence[str]
) -> tuple[dict[str, str], str]:
    named, common = {}, ""
    for text in key_variables:
        letter, is_named, variable = text.rpartition("=")
        if not is_named:
            common = variable
        elif letter in sides:
            named[letter] = variable
        else:
            raise SettingsError(
                f"--key-env {text}: {letter!r} is no side with an address; "
                f"allowed: {', '.join(sides) or 'none'}",
                advice="sides are A, B, ... in their order",
            )
    return named, common


def _give(side: Side, variable: str) -> None:
    if side.endpoint:
        side.endpoint = add_key(side.endpoint, variable)


def _is_remote(side: Side) -> bool:
    """Whether a key that names no side is meant for it: not for this machine, never in the open."""
    return side.endpoint is not None and side.endpoint.base_url.startswith("https:")
