"""A checkpoint's chat template: as data where data can say it, else carried as it is.

Data is text before and after each role's content (turns.py); devices join it with no template
engine. A template that is carried is rendered by jinja2 on the device, and here by the same code
(toolkit/runner/template.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from toolkit.artifact import BUILD_TIME, Chat, Template
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.templates import Source, read_source
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.quality.tokens import read_tokenizer
from toolkit.quality.turns import FIRST, SECOND, Messages, NotDataError, derive
from toolkit.runner.chat import render_chat, strip_text
from toolkit.runner.failure import Failure

# Roles that a template may know; others are none of a template that is carried.
ROLES = (
    *("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation"),
    *("model", "human", "context", "documents", "critic", "think"),
)
BROKEN = ("time", "memory", "characters", "crash")


def read_chat(checkpoint: Checkpoint, *, sees: bool = False) -> Chat:
    """Return the chat template, with the ids and texts that end an answer.

    White space that the source's tokenizer drops behind a special token is left out: the ids are
    the same, also in runtimes that cannot drop it. `bos_id` is set only when the template itself
    writes the bos token in front, because transformers tokenizes rendered chats without adding
    one; a template that is carried writes it itself. A model that `sees` has a processor of its
    own, which does as the tokenizer's settings say.
    CheckpointError when there is no template, or one that is broken or never ends;
    UnsupportedError when it refuses a chat of one question.
    """
    tokenizer = read_tokenizer(checkpoint)
    source = read_source(checkpoint)
    stop_ids = checkpoint.stop_ids
    added = tokenizer.get_added_tokens_decoder()
    bare = Chat(
        turns={},
        generation="",
        stop_ids=stop_ids,
        stop_texts=tuple(added[i].content for i in stop_ids if i in added),
    )
    strippers = [entry.content for entry in added.values() if entry.rstrip]
    probe = _Probe(source, bare)
    probe.check()
    try:
        chat, has_bos = derive(bare, source.text, probe.render, source.bos)
    except NotDataError as error:
        chat, has_bos = _carry(probe, str(error), strippers), False
    else:
        chat = drop_stripped(chat, strippers)
    if has_bos or (sees and checkpoint.tokenizer_config.get("add_bos_token", True)):
        chat = msgspec.structs.replace(chat, bos_id=tokenizer.token_to_id(source.bos))
    return chat


def render(chat: Chat, messages: Messages) -> str:
    """Render (role, content) messages and the generation prompt; without the bos of `bos_id`.

    The text's ids are those of the template's own text; its white space may be less.
    UnsupportedError names a role that the template lacks, or gives the template's own words.
    """
    try:
        return render_chat(chat, messages, now=BUILD_TIME)
    except Failure as failure:
        raise UnsupportedError(f"chat: {failure}") from failure


def render_turns(chat: Chat, messages: Messages) -> str:
    """Render a finished conversation; UnsupportedError as `render`.

    Where the template is for questions only, the answer stands behind its generation prompt.
    """
    if not messages:
        return ""
    is_answered = chat.template is not None and messages[-1][0] == "assistant"
    if not (is_answered and not find_ending(chat)):
        try:
            return render_chat(chat, messages, is_open=False, now=BUILD_TIME)
        except Failure as failure:
            if not is_answered:
                raise UnsupportedError(f"chat: {failure}") from failure
    return render(chat, messages[:-1]) + messages[-1][1]


def find_ending(chat: Chat) -> str:
    """What stands behind an answer that another question follows, or else at the end."""
    if chat.template is None:
        return chat.turns["assistant"][1]
    start = [("user", FIRST), ("assistant", SECOND)]
    for messages, is_open in (([*start, ("user", FIRST)], True), (start, False)):
        try:
            text = render_chat(chat, messages, is_open=is_open, now=BUILD_TIME)
        except Failure:
            continue
        if SECOND in text:
            return text.partition(SECOND)[2].partition(FIRST)[0]
    return ""


def drop_stripped(chat: Chat, strippers: Sequence[str]) -> Chat:
    """Leave out white space behind tokens whose tokenizer entry says `rstrip`.

    GGUF has no such entry: llama.cpp would make tokens of it (formats/gguf/stripping.py).
    """
    turns = {
        role: (strip_text(before, strippers), strip_text(after, strippers))
        for role, (before, after) in chat.turns.items()
    }
    generation = strip_text(chat.generation, strippers)
    return msgspec.structs.replace(chat, turns=turns, generation=generation)


@dataclass(frozen=True)
class _Probe:
    """A template that is tried out."""

    source: Source
    bare: Chat

    def make(self, why: str = "", roles: Sequence[str] = ROLES) -> Chat:
        """The chat that carries the template."""
        template = Template(
            text=self.source.text, why=why, tokens=self.source.tokens,
            tool_use=self.source.tool_use, roles=tuple(roles),
        )  # fmt: skip
        return msgspec.structs.replace(self.bare, template=template)

    def render(self, messages: Messages, *, is_open: bool = True) -> str:
        """Render with the template itself; Failure as render_chat's."""
        return render_chat(self.make(), messages, is_open=is_open, now=BUILD_TIME)

    def check(self) -> None:
        """Raise unless the template writes a chat of one question."""
        where = self.source.where
        try:
            text = self.render([("user", FIRST)])
        except Failure as failure:
            reason = failure.details.get("reason")
            if reason in ("syntax", *BROKEN):
                raise CheckpointError(
                    f"{where}: {failure}", advice="mend the checkpoint's chat template"
                ) from failure
            raise UnsupportedError(
                f"{where}: a chat of one question is needed, and {failure}",
                advice=failure.advice or "let the checkpoint's chat template take such a chat",
            ) from failure
        if FIRST not in text:
            raise UnsupportedError(
                f"{where}: the chat template leaves out the user's content",
                advice="mend the checkpoint's chat template",
            )

    def list_roles(self) -> Iterator[str]:
        """Roles whose content the template writes somewhere; user and assistant always."""
        for role in ROLES:
            if role in ("user", "assistant") or any(map(self._shows, _place(role))):
                yield role

    def _shows(self, messages: Messages) -> bool:
        try:
            return SECOND in self.render(messages)
        except Failure:
            return False


def _place(role: str) -> list[Messages]:
    """Chats in which a message of a role may stand."""
    question, answer, told = ("user", FIRST), ("assistant", "x"), (role, SECOND)
    return [[told, question], [question, told], [question, answer, told], [told]]


def _carry(probe: _Probe, why: str, strippers: Sequence[str]) -> Chat:
    """The chat with the template itself."""
    chat = probe.make(why, list(probe.list_roles()))
    assert chat.template
    template = msgspec.structs.replace(chat.template, strippers=tuple(strippers))
    return msgspec.structs.replace(chat, template=template)
