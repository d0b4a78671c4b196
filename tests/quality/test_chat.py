"""Chat templates as data, checked against texts written out by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_random_checkpoint
from tests.quality.sources import edit_json
from toolkit.artifact import Chat
from toolkit.checkpoint import Checkpoint
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.quality.chat import read_chat, render
from toolkit.quality.tokens import encode, read_tokenizer
from toolkit.runner.chat import render_chat
from toolkit.runner.manifest import Chat as RunnerChat

# The shapes of the templates published with the family.
BY_ROLE = """\
{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>
' + message['content'] + '<|end|>
' }}{% elif message['role'] == 'user' %}{{ '<|user|>
' + message['content'] + '<|end|>
' }}{% elif message['role'] == 'assistant' %}{{ '<|assistant|>
' + message['content'] + '<|end|>
' }}{% endif %}{% endfor %}"""
GENERATION_OR_EOS = """\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
MINI = BY_ROLE + GENERATION_OR_EOS
MINI_3_5 = MINI.replace("== 'system'", "== 'system' and message['content']")
VISION = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{- '<|assistant|>\n' -}}{% endif %}"
)
# Medium's user turn opens the answer, and there is no system role.
MEDIUM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|user|>\n' + m['content'] + '<|end|>\n<|assistant|>\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
)
MESSAGES = [("user", "one"), ("assistant", "two"), ("user", "three")]
TURNS = "<|user|>\none<|end|>\n<|assistant|>\ntwo<|end|>\n<|user|>\nthree<|end|>\n<|assistant|>\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer drops no white space behind special tokens."""
    folder = write_random_checkpoint(tmp_path / "checkpoint", "mha")
    set_strippers(folder, ())
    return folder


def set_strippers(folder: Path, strippers: Sequence[str]) -> None:
    """Let the tokenizer drop white space behind these special tokens and no others."""

    def change(content: dict[str, Any]) -> None:
        for entry in content["added_tokens"]:
            entry["rstrip"] = entry["content"] in strippers

    edit_json(folder / "tokenizer.json", change)


def read_with(folder: Path, template: object) -> Chat:
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(chat_template=template))
    return read_chat(Checkpoint.open(folder))


@pytest.mark.parametrize("template", [MINI, MINI_3_5, VISION, MEDIUM])
def test_published_templates(folder, template):
    assert render(read_with(folder, template), MESSAGES) == TURNS


@pytest.mark.parametrize("template", [MINI, MINI_3_5, VISION])
def test_system_role(folder, template):
    chat = read_with(folder, template)
    text = render(chat, [("system", "Be brief."), ("user", "Hi")])
    assert text == "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize("template", [MINI, MEDIUM])
def test_the_runner_renders_the_same(folder, template):
    chat = read_with(folder, template)
    twin = RunnerChat(
        turns=chat.turns, generation=chat.generation, stop_ids=chat.stop_ids, bos_id=chat.bos_id
    )
    for messages in (MESSAGES, [("user", " a\n<|end|> {{ b }} ")]):
        assert render_chat(twin, messages) == render(chat, messages)


# What Phi-3 strips behind as first published, what Phi-3.5 does, and nothing at all.
@pytest.mark.parametrize("template", [MINI, MEDIUM])
@pytest.mark.parametrize(
    "strippers", [("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), ("<|assistant|>",), ()]
)
def test_white_space_the_tokenizer_drops_is_left_out(folder, template, strippers):
    set_strippers(folder, strippers)
    chat = read_with(folder, template)
    constants = [*(text for pair in chat.turns.values() for text in pair), chat.generation]
    assert not any(f"{token}\n" in text for text in constants for token in strippers)
    tokenizer = read_tokenizer(Checkpoint.open(folder))
    assert encode(tokenizer, render(chat, MESSAGES)) == encode(tokenizer, TURNS)
    padded = [(role, f" \n {text} \n ") for role, text in MESSAGES]
    whole = TURNS
    for (_, text), (_, spaced) in zip(MESSAGES, padded, strict=True):
        whole = whole.replace(text, spaced)
    assert encode(tokenizer, render(chat, padded)) == encode(tokenizer, whole)


def test_a_carried_template_leaves_it_out_too(folder):
    set_strippers(folder, ("<|user|>", "<|end|>"))
    chat = read_with(folder, MINI.replace("message['content']", "message['content'] | trim"))
    assert chat.template is not None
    padded = [(role, f" \n {text} \n ") for role, text in MESSAGES]
    text = render(chat, padded)
    assert text == TURNS.replace("<|user|>\n", "<|user|>").replace("<|end|>\n", "<|end|>")
    tokenizer = read_tokenizer(Checkpoint.open(folder))
    assert encode(tokenizer, text) == encode(tokenizer, TURNS)


def test_a_role_without_a_turn_is_refused(folder):
    chat = read_with(folder, MEDIUM)
    assert set(chat.turns) == {"user", "assistant"}
    with pytest.raises(UnsupportedError, match="role 'system' is unknown to this model"):
        render(chat, [("system", "Be brief.")])


def test_a_role_the_template_refuses_is_left_out(folder):
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}"
        "{% endif %}{% endfor %}"
    )
    assert set(read_with(folder, refusing + MINI).turns) == {"user", "assistant"}


def test_no_bos_unless_the_template_writes_it(folder):
    bos = Checkpoint.open(folder).tokenizer_config["bos_token"]
    assert bos
    assert read_with(folder, MINI).bos_id is None
    chat = read_with(folder, "{{ bos_token }}" + MINI)
    assert chat.bos_id == Checkpoint.open(folder).special_id("bos_token_id")
    assert render(chat, MESSAGES) == TURNS


def test_bos_before_every_turn_is_part_of_the_turn(folder):
    chat = read_with(folder, MINI.replace("'<|user|>", "bos_token + '<|user|>"))
    assert chat.bos_id is None
    assert chat.turns["user"][0] == "<s><|user|>\n"


def test_stop_ids_of_the_checkpoint_and_end_of_turn(folder):
    checkpoint = Checkpoint.open(folder)
    chat = read_with(folder, MINI)
    assert chat.stop_ids[: len(checkpoint.stop_ids)] == checkpoint.stop_ids
    assert {"<|endoftext|>", "<|end|>"} <= set(chat.stop_texts)
    # A fine-tune that was saved without generation_config.json names one stop id only.
    (folder / "generation_config.json").unlink(missing_ok=True)
    edit_json(folder / "config.json", lambda c: c.update(eos_token_id=chat.stop_ids[0]))
    alone = read_chat(Checkpoint.open(folder))
    assert alone.stop_texts == ("<|endoftext|>", "<|end|>")


def test_lines_and_indents_of_blocks_do_not_count(folder):
    # As transformers compiles templates: trim_blocks and lstrip_blocks.
    block = "  {% if true %}\n{{ m['role'] ~ m['content'] }}\n  {% endif %}"
    chat = read_with(folder, "{% for m in messages %}\n" + block + "\n{% endfor %}\n")
    assert chat.turns["user"] == ("user", "\n")


def test_a_template_file_wins(folder):
    (folder / "chat_template.jinja").write_text(MEDIUM, encoding="utf-8")
    assert read_with(folder, MINI).generation == ""


def test_the_default_of_a_named_list(folder):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": MINI}]
    assert render(read_with(folder, named), MESSAGES) == TURNS


@pytest.mark.parametrize("template", [None, 5, [], [{"name": "default"}]])
def test_a_missing_template_is_named(folder, template):
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: chat_template: got"):
        read_with(folder, template)


def test_named_templates_without_a_default_are_refused(folder):
    with pytest.raises(CheckpointError, match="found the chat templates tool_use; none is named"):
        read_with(folder, [{"name": "tool_use", "template": "x"}])


def test_a_broken_template_is_named(folder):
    with pytest.raises(CheckpointError, match="chat template is not valid: line 1: Unexpected end"):
        read_with(folder, "{% for message in messages %}")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (MINI.replace("message['content']", "message['content'] | trim"), "depend on what"),
        (MINI.replace("{% for", "A chat:\n{% for", 1), "it starts a conversation with"),
        ("{{ messages[-1]['content'] }}", "leaves out contents"),
        (MINI.replace("'<|user|>", "loop.index ~ '<|user|>"), "it starts a conversation with"),
        (MINI.replace("{% endfor", "{{ '' if loop.last else '--' }}{% endfor"), "depends on the"),
        (MINI.replace("{% for", "{{ strftime_now('%d') }}{% for", 1), "it uses strftime_now"),
        # What conversations of plain texts cannot show.
        (MINI.replace("+ message['content']", "+ message['content'].split('</t>')[-1]"), "depend"),
        (MINI.replace("{% if m", "{% if '/x' in message['content'] %}x{% elif m", 1), "depend"),
        (MINI.replace("message['content']", "message[key]", 1), "depend on what"),
        (
            "{% set key = 'content' %}" + MINI.replace("e['content']", "e.get(key)"),
            "depend on what",
        ),
        (MINI + "{{ '.' if (messages | tojson | length) > 9999 }}", "messages as a whole"),
        (
            "{% set all %}" + MINI + "{% endset %}{{ all | replace('a', 'a') }}",
            "it keeps what it has written",
        ),
        (
            MINI.replace("{% if m", "{% generation %}{% endgeneration %}{% if m", 1),
            "tag of its own",
        ),
    ],
)
def test_templates_that_are_not_data_are_carried(folder, template, why):
    chat = read_with(folder, template)
    assert chat.turns == {}
    assert chat.template is not None
    assert chat.template.text == template
    assert why in chat.template.why
    assert chat.companions == ("jinja2>=3.1.6",)


def test_a_template_that_looks_into_attributes_is_refused(folder):
    with pytest.raises(UnsupportedError, match=r"SecurityError: access to attribute '__class__'"):
        read_with(folder, "{{ ''.__class__.__mro__ }}")


def test_a_template_without_the_question_is_refused(folder):
    with pytest.raises(UnsupportedError, match="leaves out the user's content"):
        read_with(folder, "Hello")


def test_an_empty_system_message_writes_nothing_where_the_template_says_so(folder):
    empty = [("system", ""), ("user", "Hi")]
    chat = read_with(folder, MINI_3_5)
    assert chat.skips_empty == ("system",)
    assert render(chat, empty) == render(chat, empty[1:])
    assert render(read_with(folder, MINI), empty).startswith("<|system|>\n<|end|>")


def test_no_generation_prompt_stands_behind_an_answer_where_the_template_says_so(folder):
    answered = [("user", "Hi"), ("assistant", "Hello")]
    chat = read_with(folder, VISION)
    assert chat.open_after == ("assistant",)
    assert render(chat, answered).endswith("Hello<|end|>\n")
    assert render(read_with(folder, MINI), answered).endswith("<|assistant|>\n")
