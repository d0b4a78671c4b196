"""What `compare` asks: conversations from the command line, from a file, or the bundled ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from toolkit.errors import SettingsError

Message = dict[str, str]

# Short, and of kinds in which small models drift apart first: facts, sums, code, formats, other
# languages, refusing to invent.
BUNDLED = (
    "What is the capital of France?",
    "What is 17 times 23? Answer with the number alone.",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Translate into German: The train leaves at half past seven.",
    "List three differences between TCP and UDP, one a line.",
    'Give me a JSON object with the keys "name" and "age" for a fictional person.',
    "Summarize in one sentence: The storm closed the harbour for two days, and nets were mended.",
)


@dataclass(frozen=True)
class Prompt:
    """One conversation, whose last message awaits an answer."""

    messages: tuple[Message, ...]

    @property
    def title(self) -> str:
        """What people read of it: the last message; roles where there are several."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.messages)


def choose_prompts(texts: Sequence[str], path: Path | None) -> tuple[Prompt, ...]:
    """Return the prompts of the command line, then those of a file; the bundled without either."""
    prompts = [make_prompt(text) for text in texts]
    if path:
        prompts += read_prompts(path)
    return tuple(prompts) or tuple(make_prompt(text) for text in BUNDLED)


def make_prompt(text: str) -> Prompt:
    """Return a user's question as a conversation."""
    return Prompt(({"role": "user", "content": text},))


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file: a question a line, or for .jsonl an object with `messages` or `prompt` a line.

    Empty lines are left out. SettingsError names the line that is none, and an empty file.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: no UTF-8 at byte {error.start}") from None
    is_jsonl = path.suffix.lower() in (".jsonl", ".ndjson")
    prompts = [
        _read_object(line, f"{path}:{number}") if is_jsonl else make_prompt(line.strip())
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise SettingsError(f"{path}: holds no prompt")
    return prompts


def _read_object(line: str, where: str) -> Prompt:
    try:
        data: Any = msgspec.json.decode(line)
        if isinstance(data, dict) and "prompt" in data:
            return make_prompt(msgspec.convert(data["prompt"], str))
        messages = data["messages"] if isinstance(data, dict) else data
        found = msgspec.convert(messages, list[Message])
        if not found or not all({"role", "content"} <= set(message) for message in found):
            raise ValueError("every message has a role and a content")
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{where}: no prompt: {error}",
            advice='a line is {"prompt": "..."} or {"messages": [{"role": ..., "content": ...}]}',
        ) from None
    return Prompt(tuple({"role": m["role"], "content": m["content"]} for m in found))
