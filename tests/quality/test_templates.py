"""Chat templates of every usual shape, beside what transformers writes with them."""

import shutil
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
from toolkit.errors import CheckpointError
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


def test_chats_with_tools_are_those_of_transformers(folder: Path) -> None:
    for name in ("tools-in-system", "tools-pretty", "llama-3.1", "granite-defaults"):
        text = templates.read(name)
        chat = read(folder, text)
        tokens = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
        for count in (1, 2, 3):
            for tools in (TOOLS, None):
                found = render_here(chat, TOOL_CHAT[:count], "", tools=tools)
                more = {"tools": tools, "add_generation_prompt": True, **tokens}
                assert found == render_there(text, TOOL_CHAT[:count], **more), (name, count)


# What stands in tokenizer_config.json, and files beside it; of each the text is its place.
SOURCES: dict[str, tuple[object, dict[str, str]]] = {
    "a text": ("config", {}),
    "a list": ([{"name": "default", "template": "config"}], {}),
    "a list with tools": (
        [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "config"}], {},
    ),
    "a dict": ({"default": "config", "tool_use": "tools"}, {}),
    "a file": ("config", {"chat_template.jinja": "file"}),
    "files": (
        [{"name": "tool_use", "template": "config"}],
        {
            "chat_template.jinja": "file",
            "additional_chat_templates/tool_use.jinja": "folder",
            "additional_chat_templates/rag.jinja": "other",
        },
    ),
    "a default in the folder": (None, {"additional_chat_templates/default.jinja": "folder"}),
    "both defaults": (
        None,
        {"chat_template.jinja": "file", "additional_chat_templates/default.jinja": "folder"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_the_template_is_the_one_that_transformers_takes(
    folder: Path, tmp_path: Path, name: str
) -> None:
    from transformers import AutoTokenizer

    place = Path(shutil.copytree(folder, tmp_path / "source"))
    config, files = SOURCES[name]

    def mark(text: str) -> str:
        return (
            text + "{{ messages[0].content | trim }}{{ bos_token }}{{ eos_token }}{{ unk_token }}"
        )

    def mark_all(found: Any) -> Any:
        if isinstance(found, str):
            return mark(found)
        if isinstance(found, dict):
            return {key: mark(text) for key, text in found.items()}
        return [{**one, "template": mark(one["template"])} for one in found]

    edit_json(place / "tokenizer_config.json", lambda c: c.pop("chat_template", None))
    if config:
        marked = mark_all(config)
        edit_json(place / "tokenizer_config.json", lambda c: c.update(chat_template=marked))
    for file, text in files.items():
        (place / file).parent.mkdir(exist_ok=True)
        (place / file).write_text(mark(text), "utf-8")
    before = Checkpoint.open(folder).fingerprint()
    assert Checkpoint.open(place).fingerprint() != before
    chat = read_chat(Checkpoint.open(place))
    there = AutoTokenizer.from_pretrained(place)
    messages = [{"role": "user", "content": "x"}]
    for tools in (None, TOOLS):
        expected = there.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True
        )
        assert render_chat(chat, messages, tools) == expected


def test_a_named_template_alone_is_refused_as_transformers_does(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="none is named default"):
        read(folder, {"tool_use": "x"})
