"""A conversation in the terminal: the same loop on a device and for a server's answers."""

from __future__ import annotations

import contextlib
import sys
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .answer import Answer, Question, encode_chat, find_room, stream_answer
from .failure import Failure
from .loading import Loaded, loading
from .manifest import read_manifest
from .settings import Sampling, read_settings

Message = tuple[str, str]
TakeText = Callable[[str], None]
# Answers a conversation, in pieces; an exception that the receiver raises ends the work.
Ask = Callable[[list[Message], TakeText], None]

# LRM, RLM, ALM; embeddings, overrides and isolates (Unicode Standard Annex 9).
TURNING = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
HELP = "/new begins a new conversation, /exit or Ctrl-D ends; Ctrl-C ends an answer."


def converse(ask: Ask, title: str, system: str = "") -> int:
    """Read lines from stdin and print answers until its end; returns the exit code.

    A line beginning with / is an order. Answers stay part of the conversation, broken off or not.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _complete_lines()
        print(f"{title}\n{HELP}", file=sys.stderr)
    start: list[Message] = [("system", system)] if system else []
    messages = list(start)
    while (line := _read_line("> " if is_terminal else "")) is not None:
        if line in ("/exit", "/quit", "/bye"):
            break
        if line == "/new":
            messages = list(start)
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            messages.append(("user", line))
            _take_turn(ask, messages)
    return 0


def chat(
    artifact: Path,
    sampling: Sampling,
    max_tokens: int | None,
    system: str = "",
    **given: int | None,
) -> int:
    """Converse with an artifact; Failure when it cannot be loaded."""
    manifest = read_manifest(artifact)
    settings = read_settings(artifact, manifest.context_length, **given)
    with loading(artifact, settings) as loaded:
        title = f"{manifest.name}, {loaded.engine} on {loaded.model.provider}"
        return converse(partial(_answer, loaded, sampling, max_tokens), title, system)


def _answer(
    loaded: Loaded,
    sampling: Sampling,
    max_tokens: int | None,
    messages: list[Message],
    take_text: TakeText,
) -> None:
    prompt_ids = encode_chat(loaded, messages)
    question = Question(prompt_ids, find_room(loaded, len(prompt_ids), max_tokens), sampling)
    with contextlib.closing(stream_answer(loaded, question, Answer())) as stream:
        for piece in stream:
            take_text(piece)


def _take_turn(ask: Ask, messages: list[Message]) -> None:
    """Print an answer as it comes, and add it; a failure takes the question back."""
    pieces: list[str] = []

    def take_text(piece: str) -> None:
        pieces.append(piece)
        print(clean(piece), end="", flush=True)

    try:
        ask(messages, take_text)
    except KeyboardInterrupt:
        print(" [broken off]", end="")
    except Failure as failure:
        messages.pop()
        print(f"error: {failure}\n  {failure.advice}\n  /new begins anew", file=sys.stderr)
        return
    print(flush=True)
    messages.append(("assistant", "".join(pieces)))


def clean(text: str) -> str:
    """Return a model's words without what could steer a terminal or turn its text around."""
    return "".join(c for c in text if c in "\n\t" or not _steers(c))


def _steers(character: str) -> bool:
    # Control characters, halves of pairs, line separators; marks of another direction.
    kinds = ("Cc", "Cs", "Zl", "Zp")
    return unicodedata.category(character) in kinds or character in TURNING


def _read_line(prompt: str) -> str | None:
    """Return a line without white space around it; None at its end, or after Ctrl-C twice."""
    for _ in range(2):
        try:
            return input(prompt).strip()
        except EOFError:
            break
        except KeyboardInterrupt:  # it may have been meant for an answer that was just over
            print(f"\n{HELP}", file=sys.stderr)
    return None


def _complete_lines() -> None:
    """Let lines be edited, and earlier ones come back, where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline

        readline.set_history_length(1000)
