"""tokenizer.json made of a tiktoken file, against what tiktoken itself makes of texts."""

import base64
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.golden.make_tiktoken import COUNT, GOLDEN, RANKS, SPECIALS, VOCAB, list_texts
from toolkit.checkpoint import ranks
from toolkit.errors import CheckpointError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(json.dumps(ranks.make_tokenizer(RANKS, VOCAB, {})))


def test_ids_are_those_of_tiktoken(tokenizer):
    texts = json.loads(GOLDEN.read_text("ascii"))["texts"]
    assert len(texts) > 700
    for text, ids in texts:
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text


def test_ids_are_those_of_tiktoken_live(tokenizer):
    tiktoken = pytest.importorskip("tiktoken")
    from tests.golden.make_tiktoken import PATTERN

    encoding = tiktoken.Encoding(
        "small", pat_str=PATTERN, mergeable_ranks=ranks.read_ranks(RANKS), special_tokens=SPECIALS
    )
    for text in list_texts():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == encoding.encode(text, allowed_special="all"), text


def test_texts_come_back(tokenizer):
    for text in list_texts():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_specials_are_phi_3_smalls(tokenizer):
    assert ranks.list_specials(COUNT, VOCAB) == {token: name for name, token in SPECIALS.items()}
    published = ranks.list_specials(100_256, 100_352)
    for token, name in (
        (100_256, "<|dummy_id_2|>"),
        (100_257, "<|endoftext|>"),
        (100_263, "<|assistant|>"),
        (100_266, "<|end|>"),
        (100_275, "<|dummy_id_11|>"),
        (100_276, "<|endofprompt|>"),
        (100_351, "<|dummy_id_86|>"),
    ):
        assert published[token] == name
    assert len(published) == 96
    assert tokenizer.get_vocab_size() == VOCAB


def test_listed_tokens_come_first():
    made = ranks.make_tokenizer(RANKS, VOCAB, {COUNT + 8: "<|tool|>"})
    contents = {entry["id"]: entry["content"] for entry in made["added_tokens"]}
    assert contents[COUNT + 8] == "<|tool|>"
    assert contents[COUNT + 9] == "<|dummy_id_1|>"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda lines: [*lines[:5], b"IQ== x", *lines[6:]], "line 6"),
        (lambda lines: [*lines[:5], b"?? 5", *lines[6:]], "line 6"),
        (lambda lines: lines[:-2] + lines[-1:], "0 up"),
        (lambda lines: lines[1:], "has no token"),
        (lambda lines: [*lines, base64.b64encode(b"qqzzq") + b" %d" % len(lines)], "no merge"),
        (lambda _: [b"version https://git-lfs.github.com/spec/v1"], "line 1"),
    ],
)
def test_damage_is_one_sentence(tmp_path: Path, edit, reason):
    path = tmp_path / ranks.RANKS_FILE
    path.write_bytes(b"\n".join(edit(RANKS.read_bytes().splitlines())) + b"\n")
    with pytest.raises(CheckpointError, match=reason) as caught:
        ranks.make_tokenizer(path, VOCAB, {})
    assert str(path) in str(caught.value)
    assert caught.value.advice


def test_more_tokens_than_the_model_has():
    with pytest.raises(CheckpointError, match=f"vocab_size allows {COUNT - 1}"):
        ranks.make_tokenizer(RANKS, COUNT - 1, {})
