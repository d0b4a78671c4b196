"""Answers in the shapes of OpenAI's API."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from ..answer import Answer

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Frame:
    """What all parts of one answer have in common."""

    model: str
    fingerprint: str
    is_chat: bool
    includes_usage: bool = False
    key: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def describe_answer(self, text: str, answer: Answer, prompt_tokens: int) -> dict[str, Any]:
        """Return the one object of an answer that is not streamed."""
        message = {"role": "assistant", "content": text, "refusal": None}
        content = {"message": message} if self.is_chat else {"text": text}
        return {
            **self._describe("chat.completion"),
            "choices": [_choose(content, answer.stop_reason)],
            "usage": _count(answer, prompt_tokens),
        }

    def describe_role(self) -> dict[str, Any]:
        """Return the first chunk of a chat's answer."""
        return self._chunk({"role": "assistant", "content": ""})

    def describe_text(self, text: str) -> dict[str, Any]:
        """Return the chunk of a piece of text."""
        return self._chunk({"content": text} if self.is_chat else text)

    def describe_end(self, answer: Answer) -> dict[str, Any]:
        """Return the last chunk with a choice: why the answer ends."""
        return self._chunk({} if self.is_chat else "", answer.stop_reason)

    def describe_usage(self, answer: Answer, prompt_tokens: int) -> dict[str, Any]:
        """Return the chunk after the last, for who asked for usage."""
        usage = _count(answer, prompt_tokens)
        return {**self._describe("chat.completion.chunk"), "choices": [], "usage": usage}

    def _chunk(self, content: dict[str, str] | str, reason: str | None = None) -> dict[str, Any]:
        named = {"text": content} if isinstance(content, str) else {"delta": content}
        chunk = {**self._describe("chat.completion.chunk"), "choices": [_choose(named, reason)]}
        return {**chunk, "usage": None} if self.includes_usage else chunk

    def _describe(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.key}" if self.is_chat else f"cmpl-{self.key}",
            "object": kind if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def encode_event(data: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def describe_model(model: str, created: int, context_tokens: int) -> dict[str, Any]:
    """Return one entry of /models."""
    return {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "phiship",
        "context_length": context_tokens,
    }


def _choose(content: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": reason}


def _count(answer: Answer, prompt_tokens: int) -> dict[str, int]:
    new_tokens = len(answer.token_ids)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }
