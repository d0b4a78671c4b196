"""The probe texts and the comparison of token ids."""

import json

import pytest
from tokenizers import Tokenizer

from tests.quality.sources import edit_json
from toolkit.checkpoint import Checkpoint
from toolkit.errors import CheckpointError
from toolkit.quality import chat, tokens


@pytest.fixture
def checkpoint(example) -> Checkpoint:
    return Checkpoint.open(example)


def test_probes_hold_every_added_token_alone_and_in_a_chat(checkpoint):
    tokenizer = tokens.read_tokenizer(checkpoint)
    template = chat.read_chat(checkpoint)
    probes = tokens.list_probes(tokenizer, template)
    assert set(tokens.PROBES) < set(probes)
    assert len(set(probes)) == len(probes)
    added = [entry.content for entry in tokenizer.get_added_tokens_decoder().values()]
    assert added
    user = template.turns["user"]
    for token in added:
        assert token in probes
        assert any(user[0] + token + user[1] in probe for probe in probes)


def test_probes_reach_the_byte_fallback_and_whitespace(checkpoint):
    tokenizer = tokens.read_tokenizer(checkpoint)
    ids = {i for text in tokens.PROBES for i in tokens.encode(tokenizer, text)}
    pieces = {tokenizer.id_to_token(i) for i in ids}
    assert "<0xF0>" in pieces  # an emoji
    assert any(set(piece) == {"\u2581"} and len(piece) > 1 for piece in pieces)


def test_source_ids_have_nothing_added(checkpoint):
    tokenizer = tokens.read_tokenizer(checkpoint)
    bos_id = checkpoint.special_id("bos_token_id")
    assert tokenizer.encode("Hello").ids[0] == bos_id
    assert bos_id not in tokens.encode(tokenizer, "Hello")
    assert tokens.encode(tokenizer, "<s>") == [bos_id]


def test_differences_are_found_and_shown(checkpoint):
    tokenizer = tokens.read_tokenizer(checkpoint)

    def encode_source(text: str) -> list[int]:
        return tokens.encode(tokenizer, text)

    def encode_shifted(text: str) -> list[int]:
        return [i + ("\t" in text) for i in encode_source(text)]

    assert tokens.compare_ids(encode_source, encode_source, tokens.PROBES) == []
    found = tokens.compare_ids(encode_source, encode_shifted, tokens.PROBES)
    assert [m.text for m in found] == [text for text in tokens.PROBES if "\t" in text]
    mismatch = tokens.Mismatch("a\n", (1, 2), tuple(range(30)))
    assert str(mismatch) == (
        "'a\\n': the source has [1, 2], the artifact [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, "
        "13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, ...]"
    )


@pytest.mark.parametrize(("left", "found"), [(True, "only tokenizer.model"), (False, "no token")])
def test_a_missing_tokenizer_is_named(tmp_path, checkpoint, left, found):
    checkpoint.folder = tmp_path
    if left:
        (tmp_path / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match=f"tokenizer.json: missing; found {found}") as caught:
        tokens.read_tokenizer(checkpoint)
    assert "AutoTokenizer" in caught.value.advice


def test_a_damaged_tokenizer_is_named(tmp_path, checkpoint):
    checkpoint.folder = tmp_path
    (tmp_path / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(CheckpointError, match=r"tokenizer.json: cannot be read"):
        tokens.read_tokenizer(checkpoint)


def test_an_unknown_pre_tokenizer_is_named(tmp_path, checkpoint, example):
    content = json.loads((example / "tokenizer.json").read_bytes())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Abacus"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    checkpoint.folder = tmp_path
    with pytest.raises(CheckpointError, match="cannot be read: pre_tokenizer 'Abacus'") as caught:
        tokens.read_tokenizer(checkpoint)
    assert "pip install --upgrade tokenizers" in caught.value.advice


def test_ids_beyond_the_vocabulary_are_found(tmp_path, example):
    path = tmp_path / "tokenizer.json"
    path.write_bytes((example / "tokenizer.json").read_bytes())
    vocab = Tokenizer.from_file(str(path)).get_vocab_size()
    tokens.check_vocabulary(Tokenizer.from_file(str(path)), vocab, "here")
    edit_json(path, lambda c: c["added_tokens"].append(added_token(vocab, "<|extra|>")))
    with pytest.raises(CheckpointError, match=rf"here: tokenizer.json has id {vocab} \('<\|extra"):
        tokens.check_vocabulary(Tokenizer.from_file(str(path)), vocab, "here")


def added_token(token: int, content: str) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, "special": True, **flags}


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "Grüße 你好 \U0001f468\u200d\U0001f469 end\n\n  indented<|user|> x",
        "\u20ac",
    ],
)
def test_each_token_has_its_text(checkpoint, text):
    tokenizer = tokens.read_tokenizer(checkpoint)
    ids = tokens.encode(tokenizer, text)
    texts = tokens.split_text(tokenizer, ids)
    assert len(texts) == len(ids)
    # The space in front is what the tokenizer adds and its decoder takes away.
    assert "".join(texts) == " " + tokenizer.decode(ids, skip_special_tokens=False)
    assert "\ufffd" not in "".join(texts)


def test_half_characters_are_shown_as_such(checkpoint):
    tokenizer = tokens.read_tokenizer(checkpoint)
    half = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "你".encode()][1:]
    user = tokens.encode(tokenizer, "<|user|>")
    assert "".join(tokens.split_text(tokenizer, half)) == "\ufffd" * 2
    assert tokens.split_text(tokenizer, [*half, *user]) == ["", "", "\ufffd\ufffd<|user|>"]
    assert tokens.split_text(tokenizer, half * 3) == ["", "", "", "\ufffd" * 4, "", "\ufffd" * 2]
    assert tokens.split_text(tokenizer, []) == []
