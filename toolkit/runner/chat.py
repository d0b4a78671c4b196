"""Chat text from the manifest: template data, or the template itself; the same for every engine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from .failure import Failure

if TYPE_CHECKING:
    from .template import Carried

    # (role, content), or a message as OpenAI's API has it.
    Message = tuple[str, str] | Mapping[str, Any]

# White_Space of Unicode, as the tokenizers library drops it; Python's \s has four more.
WHITE_SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"


class Chat(Protocol):
    """What of a manifest's chat is needed to render one."""

    @property
    def turns(self) -> Mapping[str, tuple[str, str]]:
        """Texts before and after each role's content."""

    @property
    def generation(self) -> str:
        """The text that opens an answer."""

    @property
    def skips_empty(self) -> Sequence[str]:
        """Roles whose empty messages write nothing."""

    @property
    def open_after(self) -> Sequence[str]:
        """Roles behind which no generation prompt stands."""

    @property
    def roles(self) -> Sequence[str]:
        """The roles that messages may have."""

    @property
    def template(self) -> Carried | None:
        """The template that is carried instead of all that."""


def render_chat(
    chat: Chat,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    is_open: bool = True,
    now: float | None = None,
) -> str:
    """Render messages, then, when the chat is open for an answer, the generation prompt.

    Failure `request` names a role that the template lacks, or gives the template's own words.
    `now`, in seconds since 1970, stands for the time of the device.
    """
    if chat.template is None:
        return _join(chat, messages, tools, is_open=is_open)
    from .template import render_template

    text = render_template(chat.template, messages, tools, is_open=is_open, now=now)
    for message in messages:
        role = read_pair(message)[0]
        if role not in chat.roles:  # the template has passed over it without a word
            raise _refuse_role(role, chat)
    return strip_text(text, chat.template.strippers)


def prepare_template(chat: Chat) -> None:
    """Start what renders a template that is carried, so that it is ready when it is needed."""
    if chat.template is not None:
        from .template import RENDERER

        RENDERER.start()


def check_template(chat: Chat) -> None:
    """Raise Failure `runtime` where a template is carried, and nothing here can render it."""
    if chat.template is not None:
        from .template import RENDERER

        RENDERER.check()


def strip_text(text: str, strippers: Iterable[str]) -> str:
    """Drop white space behind each of `strippers`; the source's token ids stay the same."""
    alternatives = "|".join(map(re.escape, strippers))
    return re.sub(f"({alternatives}){WHITE_SPACE}+", r"\1", text) if alternatives else text


def read_pair(message: Message) -> tuple[str, str]:
    """Return a message's role and content; Failure `request` for one without a text."""
    if isinstance(message, tuple):
        return message
    role, content = message.get("role"), message.get("content")
    return str(role), content if isinstance(content, str) else ""


def _join(
    chat: Chat, messages: Sequence[Message], tools: Sequence[Any] | None, *, is_open: bool
) -> str:
    if tools:
        raise Failure("request", "this model's chat template has no place for tools")
    parts, role = [], ""
    for role, content in map(read_pair, messages):
        if role not in chat.turns:
            raise _refuse_role(role, chat)
        if content or role not in chat.skips_empty:
            before, after = chat.turns[role]
            parts.append(before + content + after)
    return "".join(parts) + (chat.generation if is_open and role not in chat.open_after else "")


def _refuse_role(role: str, chat: Chat) -> Failure:
    known = ", ".join(sorted(chat.roles))
    return Failure("request", f"role {role!r} is unknown to this model; allowed: {known}")
