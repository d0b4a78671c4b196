"""Chat templates of every usual shape, beside what transformers writes with them."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests import templates
from tests.checkpoints import write_random_checkpoint
from tests.quality.sources import edit_json
from toolkit.artifact import Chat
from toolkit.checkpoint import Checkpoint
from toolkit.quality.chat import read_chat
from toolkit.runner.chat import render_chat
from toolkit.runner.failure import Failure

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Find <b>\"it\"</b> & 'more' é",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
        },
    }
]
TOOL_CHAT = [
    {"role": "user", "content": "Look up 'owl'."},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "look_up", "arguments": {"word": "owl & é"}}}],
    },
    {"role": "tool", "content": "a bird"},
]
CONTENTS = ("  Hello\n", "<think>\nhm\n</think>\n\nOne ", "", "2 < 3 /no_think", "{{ x }} 'é' \"")
LONGEST = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer drops no white space behind special tokens."""
    folder = write_random_checkpoint(tmp_path_factory.mktemp("templates") / "checkpoint", "mha")

    def keep_space(content: dict[str, Any]) -> None:
        for entry in content["added_tokens"]:
            entry["rstrip"] = False

    edit_json(folder / "tokenizer.json", keep_space)
    return folder


def read(folder: Path, template: object) -> Chat:
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(chat_template=template))
    return read_chat(Checkpoint.open(folder))


def list_conversations() -> Iterator[list[tuple[str, str]]]:
    """Every order of roles up to three messages, and longer chats in turn."""
    for count in range(1, LONGEST + 1):
        for number, roles in enumerate(product(("system", "user", "assistant"), repeat=count)):
            yield [
                (role, CONTENTS[(number + place) % len(CONTENTS)])
                for place, role in enumerate(roles)
            ]
    for count in range(4, 8):
        turns = [(("user", "assistant")[i % 2], CONTENTS[-i % len(CONTENTS)]) for i in range(count)]
        yield turns
        yield [("system", "Be brief."), *turns]


def render_there(template: str, messages: list[Any], **more: Any) -> str | None:
    """What transformers writes; None when the template refuses, an error's name when it fails."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    plain = [
        {"role": one[0], "content": one[1]}
        if isinstance(one, tuple)
        else {key: value for key, value in one.items() if value is not None}
        for one in messages
    ]
    try:
        return str(render_jinja_template([plain], chat_template=template, **more)[0][0])
    except TemplateError as error:
        return f"{type(error).__name__}: {error}"
    except TypeError as error:
        return f"TypeError: {error}"


def render_here(chat: Chat, messages: list[Any], bos: str, **more: Any) -> str | None:
    """The same of ours."""
    start = "" if chat.bos_id is None else bos
    try:
        return start + render_chat(chat, messages, **more)
    except Failure as failure:
        assert failure.kind == "request"
        words = str(failure).partition("this chat: ")[2]
        is_own = failure.details.get("reason") == "refused"
        return f"TemplateError: {words}" if is_own else words or "unknown role"


@pytest.mark.parametrize("name", templates.NAMES)
def test_chats_are_those_of_transformers(folder: Path, name: str) -> None:
    text = templates.read(name)
    chat = read(folder, text)
    assert (chat.template is None) == (name in templates.IS_DATA)
    tokens = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
    compared = 0
    for messages in list_conversations():
        for is_open in (True, False):
            if chat.template is None and not is_open:
                continue  # data is for questions: it knows no end of a chat
            found = render_here(chat, messages, "<s>", is_open=is_open)
            expected = render_there(text, messages, add_generation_prompt=is_open, **tokens)
            if not all(role in chat.roles for role, _ in messages):
                assert found == "unknown role" or (found or "").startswith("TemplateError")
            else:
                compared += 1
                assert found == expected, messages
    assert compared > 10
