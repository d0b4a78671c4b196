"""A checkpoint's chat template turned into data: text before and after each role's content.

Devices render chats with no template engine, so the Jinja template is rendered here with marks for
contents, read off, and the result is held against the template itself on whole conversations.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment

from toolkit.artifact import Chat
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.config import read_json
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.quality.tokens import read_tokenizer

Messages = Sequence[tuple[str, str]]

ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

# Two contents that no template holds.
FIRST, SECOND = "first-mark-5c1d", "second-mark-5c1d"
# The last contents must come through untouched, whitespace and all.
CONVERSATIONS: tuple[Messages, ...] = (
    (("user", "Hello"),),
    (("user", "one"), ("assistant", "two"), ("user", "three")),
    (("system", "Be brief."), ("user", "Hello")),
    (
        ("system", "Be brief."),
        ("user", "2 + 2?"),
        ("assistant", "4"),
        ("user", "3 + 3?"),
        ("assistant", "6"),
        ("user", "Why?"),
    ),
    (("user", "  spaces \n\nand lines\n"), ("assistant", "\n{{ x }} <b>'\" "), ("user", " ")),
)


def read_chat(checkpoint: Checkpoint, *, sees: bool = False) -> Chat:
    """Return the chat template as data, with the ids and texts that end an answer.

    White space that the source's tokenizer drops behind a special token is left out: the ids are
    the same, also in runtimes that cannot drop it. `bos_id` is set only when the template itself
    writes the bos token in front, because transformers tokenizes rendered chats without adding
    one. A model that `sees` has a processor of its own, which does as the tokenizer's settings say.
    CheckpointError when there is no template; UnsupportedError when data cannot express it.
    """
    tokenizer = read_tokenizer(checkpoint)
    template = _Template.read(checkpoint)
    turns, generation, has_bos = _derive(template)
    bos_id = tokenizer.token_to_id(template.bos) if has_bos else None
    stop_ids = checkpoint.stop_ids
    added = tokenizer.get_added_tokens_decoder()
    chat = Chat(
        turns=turns,
        generation=generation,
        stop_ids=stop_ids,
        stop_texts=tuple(added[i].content for i in stop_ids if i in added),
        bos_id=bos_id,
    )
    _verify(template, chat)
    if sees and checkpoint.tokenizer_config.get("add_bos_token", True):
        chat = msgspec.structs.replace(chat, bos_id=tokenizer.token_to_id(template.bos))
    return drop_stripped(chat, [entry.content for entry in added.values() if entry.rstrip])


def render(chat: Chat, messages: Messages) -> str:
    """Render (role, content) messages and the generation prompt; without the bos of `bos_id`.

    The text's ids are those of the template's own text; its white space may be less.
    """
    return render_turns(chat, messages) + chat.generation


def render_turns(chat: Chat, messages: Messages) -> str:
    """Render a finished conversation; UnsupportedError names a role that the template lacks."""
    for role, _ in messages:
        if role not in chat.turns:
            raise UnsupportedError(
                f"chat role: got {role!r}; this checkpoint's template has {', '.join(chat.turns)}"
            )
    return "".join(chat.turns[role][0] + text + chat.turns[role][1] for role, text in messages)


def drop_stripped(chat: Chat, strippers: Sequence[str]) -> Chat:
    """Leave out white space behind tokens whose tokenizer entry says `rstrip`.

    GGUF has no such entry: llama.cpp would make tokens of it (formats/gguf/stripping.py).
    """
    if not strippers:
        return chat
    pattern = re.compile(f"({'|'.join(map(re.escape, strippers))})\\s+")

    def drop(text: str) -> str:
        return pattern.sub(r"\1", text)

    turns = {role: (drop(before), drop(after)) for role, (before, after) in chat.turns.items()}
    return msgspec.structs.replace(chat, turns=turns, generation=drop(chat.generation))


@dataclass(frozen=True)
class _Template:
    """A compiled template with the checkpoint's special tokens; `where` names it in errors."""

    where: str
    compiled: jinja2.Template
    tokens: Mapping[str, str]

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> "_Template":
        """Find and compile the template; CheckpointError when it is missing or no Jinja."""
        where, source = _find_source(checkpoint)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_exception
        try:
            compiled = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{where}: not a valid template: {error}") from error
        return cls(where, compiled, _special_tokens(checkpoint))

    @property
    def bos(self) -> str:
        """Text of the bos token; empty when there is none."""
        return self.tokens.get("bos_token", "")

    def render(self, messages: Messages, *, is_open: bool) -> str:
        """Render as transformers' apply_chat_template does; `is_open` asks for an answer."""
        content = [{"role": role, "content": text} for role, text in messages]
        try:
            return self.compiled.render(
                messages=content, add_generation_prompt=is_open, **self.tokens
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise self.error(f"it refuses {[role for role, _ in messages]} ({error})") from error

    def error(self, reason: str) -> UnsupportedError:
        """The error that says why this template is not data."""
        return UnsupportedError(
            f"{self.where}: this chat template cannot be expressed as text before and after each "
            f"content: {reason}",
            advice="simplify the checkpoint's chat template; a device renders it without Jinja",
        )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _find_source(checkpoint: Checkpoint) -> tuple[str, str]:
    """Where the template stands and its text; the file wins over the config, as in transformers."""
    path = checkpoint.tokenizer_folder / "chat_template.jinja"
    if path.is_file():
        return str(path), path.read_text(encoding="utf-8")
    where = f"{checkpoint.tokenizer_folder / 'tokenizer_config.json'}: chat_template"
    found = checkpoint.tokenizer_config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found}
        found = named.get("default")
    if not isinstance(found, str):
        raise CheckpointError(
            f"{where}: got {found!r}; allowed a template, or a list with one named default",
            advice="add chat_template.jinja to the checkpoint",
        )
    return where, found


def _special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """The special tokens a template may write, as text."""
    path = checkpoint.tokenizer_folder / "special_tokens_map.json"
    fields: dict[str, Any] = read_json(path) if path.is_file() else {}
    fields |= {key: value for key, value in checkpoint.tokenizer_config.items() if value}
    tokens = {name: fields[name] for name in SPECIAL_TOKENS if fields.get(name)}
    return {n: t["content"] if isinstance(t, dict) else str(t) for n, t in tokens.items()}


def _derive(template: _Template) -> tuple[dict[str, tuple[str, str]], str, bool]:
    """Turns by role, the generation prompt, and whether the bos token stands in front of all."""
    between = {role: _between(template, "user", role) for role in ROLES}
    if between["user"] is None or between["assistant"] is None:
        raise template.error("it leaves out the user's or the assistant's content")
    heads = {role: _head(template, role) for role, text in between.items() if text is not None}
    has_bos = not between["user"].endswith(heads["user"])
    if has_bos and not (template.bos and heads["user"].startswith(template.bos)):
        raise template.error(f"it starts a conversation with {heads['user']!r}")
    befores = {r: h.removeprefix(template.bos) if has_bos else h for r, h in heads.items()}
    turns = {}
    for role, before in befores.items():
        gap = _between(template, role, "user") or ""
        if not gap.endswith(befores["user"]):
            raise template.error(f"what follows the {role}'s content depends on the next role")
        turns[role] = (before, gap[: len(gap) - len(befores["user"])])
    end = template.render([("user", FIRST)], is_open=True).partition(FIRST)[2]
    if not end.startswith(turns["user"][1]):
        raise template.error("what follows the user's content depends on the generation prompt")
    return turns, end[len(turns["user"][1]) :], has_bos


def _head(template: _Template, role: str) -> str:
    """What stands before the first content of a conversation that `role` opens."""
    return template.render([(role, FIRST)], is_open=False).partition(FIRST)[0]


def _between(template: _Template, role: str, next_role: str) -> str | None:
    """What stands between contents of two roles; None when one of them is left out or refused."""
    messages = [(role, FIRST), (next_role, SECOND)]
    try:
        text = template.render(messages, is_open=False)
    except UnsupportedError:
        # A template may refuse the system role; refusing the others ends in an error later.
        return None
    if FIRST not in text or SECOND not in text:
        return None
    return text.partition(FIRST)[2].partition(SECOND)[0]


def _verify(template: _Template, chat: Chat) -> None:
    """Hold the data against the template on every conversation; UnsupportedError on the first."""
    bos = "" if chat.bos_id is None else template.bos
    for messages in CONVERSATIONS:
        if any(role not in chat.turns for role, _ in messages):
            continue
        expected = template.render(messages, is_open=True)
        if (found := bos + render(chat, messages)) != expected:
            raise template.error(f"it renders {expected!r}, the data {found!r}")
