"""Chat text from the manifest's template data, the same for every engine."""

from __future__ import annotations

from collections.abc import Sequence

from .failure import Failure
from .manifest import Chat


def render_chat(chat: Chat, messages: Sequence[tuple[str, str]]) -> str:
    """Render (role, content) messages, then the generation prompt."""
    parts = []
    for role, content in messages:
        if role not in chat.turns:
            raise Failure(
                "request",
                f"role {role!r} is unknown to this model; allowed: {', '.join(sorted(chat.turns))}",
            )
        before, after = chat.turns[role]
        parts.append(before + content + after)
    return "".join(parts) + chat.generation
