"""Texts become sequences of the right ids, and a bad file one clear sentence."""

import itertools
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import msgspec
import pytest

from tests.quality.sources import edit_json
from toolkit.artifact import Chat
from toolkit.checkpoint import Checkpoint
from toolkit.errors import CheckpointError, SettingsError
from toolkit.quality import tokens
from toolkit.quality.chat import read_chat
from toolkit.quality.texts import Text, digest_ids, read_text


@pytest.fixture(scope="module")
def source(example) -> Checkpoint:
    return Checkpoint.open(example)


@pytest.fixture(scope="module")
def chat(source) -> Chat:
    return read_chat(source)


def decode(source: Checkpoint, text: Text) -> str:
    ids = list(itertools.chain.from_iterable(text.sequences))
    return tokens.read_tokenizer(source).decode(ids, skip_special_tokens=False)


def seen_topics(source: Checkpoint, text: Text) -> set[str]:
    """Topics of which a whole paragraph stands in the text."""
    found = decode(source, text)
    return {
        name
        for name, topic in topics.items()
        if any(len(part) > 80 and part in found for part in topic.split("\n\n"))
    }


@pytest.mark.parametrize("part", ["evaluation", "calibration"])
def test_sequences_have_the_length_and_the_number_asked_for(source, chat, part):
    text = read_text(source, chat, part, tokens=1000, length=128)
    assert [len(ids) for ids in text.sequences] == [128] * 7
    assert text.count == 896
    assert len(set(text.sequences)) == 7
    assert text == read_text(source, chat, part, tokens=1000, length=128)
    assert text.digest == digest_ids(text.sequences)
    assert part in text.name


def test_the_parts_share_no_topic(source, chat):
    # 10 ** 6 tokens are more than the manual has.
    evaluation = read_text(source, chat, "evaluation", tokens=10**6, length=64)
    calibration = read_text(source, chat, "calibration", tokens=10**6, length=64)
    held_out = set(sorted(topics)[::20])
    assert held_out <= seen_topics(source, evaluation)
    seen = seen_topics(source, calibration)
    assert not held_out & seen
    assert len(seen) > 0.8 * len(topics)


def test_few_tokens_still_come_from_the_whole_manual(source, chat):
    text = read_text(source, chat, "calibration", tokens=4096, length=128)
    seen = seen_topics(source, text)
    names = sorted(topics)
    thirds = [set(names[i * len(names) // 3 : (i + 1) * len(names) // 3]) for i in range(3)]
    assert all(third & seen for third in thirds)


def test_the_manual_is_rendered_as_chats(source, chat):
    text = decode(source, read_text(source, chat, "evaluation", tokens=10**6, length=512))
    before, after = chat.turns["user"]
    name = sorted(topics)[0]
    assert text.startswith(f"{before} Explain {name} in Python.{after}{chat.turns['assistant'][0]}")


def test_a_bos_id_stands_in_front_of_each_chat(source, chat, tmp_path):
    path = write(tmp_path / "chats.jsonl", *[[{"role": "user", "content": "Hello"}]] * 3)
    with_bos = msgspec.structs.replace(chat, bos_id=1)
    (ids,) = read_text(source, with_bos, "evaluation", path=path, tokens=999, length=512).sequences
    one = tokens.encode(tokens.read_tokenizer(source), "<|user|>Hello<|end|>")
    assert list(ids) == [1, *one] * 3


def test_sequences_are_never_longer_than_the_context(source, chat):
    context = source.config.integer("max_position_embeddings")
    text = read_text(source, chat, "evaluation", tokens=3 * context, length=2 * context)
    assert [len(ids) for ids in text.sequences] == [context] * 3


def test_few_tokens_make_one_short_sequence(source, chat):
    text = read_text(source, chat, "evaluation", tokens=10, length=512)
    assert [len(ids) for ids in text.sequences] == [10]


@pytest.mark.parametrize("count", [1, 0, -5])
def test_a_single_token_is_refused(source, chat, count):
    with pytest.raises(ValueError, match=f"{count} tokens; allowed 2 and more"):
        read_text(source, chat, "evaluation", tokens=count, length=512)


def write(path: Path, *chats: Any) -> Path:
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), "utf-8")
    return path


def read(source: Checkpoint, chat: Chat, path: Path, **options: int) -> Text:
    options = {"tokens": 2048, "length": 256, **options}
    return read_text(source, chat, "evaluation", path=path, **options)


def test_plain_text_is_taken_as_it_is(source, chat, tmp_path):
    path = tmp_path / "notes.txt"
    content = "  Two spaces,\r\na tab\tand Grüße.\n\n<|user|>Hello<|end|>"
    path.write_bytes(content.encode())
    (ids,) = read(source, chat, path).sequences
    assert list(ids) == tokens.encode(tokens.read_tokenizer(source), content)
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())  # a mark that some editors put in front
    assert read(source, chat, path).sequences == (ids,)


def test_a_long_plain_text_is_taken_from_the_beginning(source, chat, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("Paris is the capital of France. " * 100_000, "utf-8")
    text = read(source, chat, path, tokens=100, length=32)
    assert [len(ids) for ids in text.sequences] == [32] * 3
    assert decode(source, text).startswith("Paris is the capital")


def test_chats_come_in_both_forms(source, chat, tmp_path):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    path = write(tmp_path / "chats.jsonl", {"messages": messages, "id": 7}, messages)
    path.write_text("\n" + path.read_text("utf-8") + "  \n", "utf-8")
    (ids,) = read(source, chat, path).sequences
    one = "<|user|>Hello<|end|><|assistant|>Hi!<|end|>"
    assert list(ids) == tokens.encode(tokens.read_tokenizer(source), one + one)


GOOD = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": [{"role": "user", "content": "cut', "JSON is malformed: invalid character"),
        ('"words"', "Expected `object | array`"),
        ("{}", "missing required field `messages`"),
        ('[{"role": "user"}]', "missing required field `content`"),
        ('[{"role": "user", "content": null}]', "got `null`"),
        ('[{"role": "robot", "content": "x"}]', "chat: role 'robot' is unknown"),
        ('[{"role": "user", "content": "\\ud800"}]', "Input data was truncated"),
    ],
)
def test_a_bad_line_is_named(source, chat, tmp_path, line, said):
    path = write(tmp_path / "chats.jsonl", GOOD, GOOD)
    path.write_text(path.read_text("utf-8") + line + "\n", "utf-8")
    with pytest.raises(SettingsError) as caught:
        read(source, chat, path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
@pytest.mark.parametrize("content", ["", "\n", "Hi"])
def test_a_text_without_two_tokens_is_refused(source, chat, tmp_path, name, content):
    if name.endswith("jsonl"):
        content = content and "\n[]\n"
    (tmp_path / name).write_text(content, "utf-8")
    try:
        text = read(source, chat, tmp_path / name)
    except SettingsError as error:
        assert f"{tmp_path / name}: found " in str(error)
        assert "tokens; allowed 2 and more" in str(error)
    else:
        assert content in ("\n", "Hi")
        assert text.count >= 2


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"abc\x80def", "byte 0x80 is not UTF-8"), (b"abc\0def", "found a NUL byte")],
)
def test_a_binary_file_is_refused(source, chat, tmp_path, content, said):
    path = tmp_path / "binary.txt"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=f"binary.txt: {said}"):
        read(source, chat, path)


def test_a_missing_file_is_refused(source, chat, tmp_path):
    with pytest.raises(SettingsError, match=r"none.txt: cannot be read: No such file"):
        read(source, chat, tmp_path / "none.txt")
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        read(source, chat, tmp_path)


def test_a_text_shorter_than_a_sequence_is_one(source, chat, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Paris is the capital of France.", "utf-8")
    text = read(source, chat, path)
    assert len(text.sequences) == 1
    assert 2 <= text.count < 40


def test_ids_beyond_the_vocabulary_are_the_sources_fault(chat, example, tmp_path):
    for path in example.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_bytes((example / "config.json").read_bytes())
    edit_json(tmp_path / "config.json", lambda config: config.update(vocab_size=1000))
    with pytest.raises(CheckpointError, match="vocab_size allows 0 to 999"):
        read_text(Checkpoint.open(tmp_path), chat, "evaluation", tokens=64, length=32)


def test_the_digest_knows_ids_and_cuts():
    assert digest_ids([(1, 2), (3,)]) != digest_ids([(1,), (2, 3)])
    assert digest_ids([(1, 2)]) != digest_ids([(2, 1)])
    # sha256 of the bytes 01000000 05000000, by coreutils' sha256sum.
    assert digest_ids([(5,)]) == "eca75f8497701d6223817cde38bf42cdd1124e01ef6b705bcfe9a584f7b42f0f"
