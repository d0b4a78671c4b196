"""The tokenizer inside model.gguf gives the source tokenizer's ids, in llama.cpp itself."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer

from tests.checkpoints import random_weights, variant_config, write_safetensors
from tests.formats.gguf_cases import make_recipe
from tests.formats.writing import write_artifact
from toolkit.checkpoint import TOKENIZER_FILES, Checkpoint
from toolkit.errors import CheckpointError
from toolkit.formats import gguf
from toolkit.formats.gguf import stripping, vocabulary
from toolkit.formats.gguf.session import GgufSession
from toolkit.formats.gguf.vocabulary import Token, TokenType
from toolkit.quality import chat as chats
from toolkit.quality import tokens
from toolkit.runner.engines import llama_cpp
from toolkit.runner.settings import Settings

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?\n"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": " Why?"},
]
ASCII_SPACES = (" ", "\n", "\t", "\r", "\x0b", "\x0c", "  \n")
OTHER_SPACES = ("\u00a0", "\u3000", "\u2003", "\u0085", "\u2028", "\x1c", "\u200b", "\u2581")
WORDS = ("a", "Hello", " the", "é", "e\u0301", "漢字", "😀", "<", "<|", "|>", "end", "<0x0A>",
         "12", "\ufffd", "\x7f")  # fmt: skip


def write_source(
    folder: Path, tokenizer: Path, without: tuple[str, ...] = (), **changes: Any
) -> Path:
    """A checkpoint of one small layer with the tokenizer's files."""
    folder.mkdir()
    for path in tokenizer.iterdir():
        if path.name in TOKENIZER_FILES and path.name not in without:
            shutil.copyfile(path, folder / path.name)
    added = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_added_tokens_decoder()
    ids = {token.content: token_id for token_id, token in added.items()}
    highest = max(ids.values())
    stops = [ids[text] for text in ("<|endoftext|>", "<|assistant|>", "<|end|>")]
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip
    config = {**variant_config("mha"), **shape, "vocab_size": -(-highest // 64) * 64}
    config |= {"bos_token_id": 1, "eos_token_id": stops[0], "pad_token_id": stops[0], **changes}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    generation = {"bos_token_id": 1, "eos_token_id": stops}
    (folder / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    write_safetensors(folder / "model.safetensors", random_weights(config), "bf16")
    return folder


def strip_behind(folder: Path, *texts: str) -> None:
    """Let the tokenizer drop white space behind these added tokens, and no others."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text("utf-8"))
        for entry in content.get("added_tokens") or content["added_tokens_decoder"].values():
            entry["rstrip"] = entry["content"] in texts
        (folder / name).write_text(json.dumps(content), "utf-8")


@contextmanager
def opened(checkpoint: Checkpoint, folder: Path, model: str = "tiny-phi3") -> Iterator[GgufSession]:
    """The checkpoint as a GGUF artifact, open in llama.cpp."""
    folder.mkdir()
    write_artifact(make_recipe("f16", model=model), checkpoint, folder)
    session = gguf.open_session(folder)
    try:
        yield session
    finally:
        session.close()


def mix_texts(specials: list[str], spaces: tuple[str, ...], count: int) -> Iterator[str]:
    """Seeded mixtures of special tokens, white space and words."""
    rng = random.Random(7)
    for _ in range(count):
        kinds = rng.choices((specials, spaces, WORDS), k=rng.randint(1, 8))
        yield "".join(rng.choice(kind) for kind in kinds)


def assert_same_ids(
    checkpoint: Checkpoint, encode: Callable[[str], list[int]], spaces: tuple[str, ...]
) -> None:
    source = tokens.read_tokenizer(checkpoint)
    specials = sorted(added.content for added in source.get_added_tokens_decoder().values())
    texts = tokens.list_probes(source, chats.read_chat(checkpoint))
    texts += mix_texts(specials, spaces, 4000)
    different = tokens.compare_ids(lambda text: tokens.encode(source, text), encode, texts)
    assert not different, different[0]


def test_ids_of_the_example(example: Path, tmp_path: Path) -> None:
    """Phi-3 of April 2024: llama.cpp's own rule for white space, which knows ASCII's only."""
    checkpoint = Checkpoint.open(example)
    with opened(checkpoint, tmp_path / "out") as session:
        assert not session._tokenizer._strippers
        assert_same_ids(checkpoint, session.encode, ASCII_SPACES)


@pytest.mark.parametrize("texts", [("<|assistant|>", "</s>"), (), ("<|user|>",)])
def test_ids_where_llama_cpps_rule_does_not_fit(
    texts: tuple[str, ...], example: Path, tmp_path: Path
) -> None:
    folder = write_source(tmp_path / "source", example)
    strip_behind(folder, *texts)
    checkpoint = Checkpoint.open(folder)
    with opened(checkpoint, tmp_path / "out") as session:
        assert_same_ids(checkpoint, session.encode, ASCII_SPACES + OTHER_SPACES)


@pytest.mark.parametrize("without", [(), ("tokenizer.model",)], ids=["both files", "json alone"])
def test_ids_of_the_real_tokenizer(
    without: tuple[str, ...], real_tokenizer: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(write_source(tmp_path / "source", real_tokenizer, without))
    with opened(checkpoint, tmp_path / "out", model="phi-3.5-mini") as session:
        assert_same_ids(checkpoint, session.encode, ASCII_SPACES + OTHER_SPACES)
        assert all(session.stops(token) for token in checkpoint.stop_ids)


def test_ids_without_tokenizer_model(example: Path, tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", example, without=("tokenizer.model",))
    checkpoint = Checkpoint.open(folder)
    with opened(checkpoint, tmp_path / "out") as session:
        assert_same_ids(checkpoint, session.encode, ASCII_SPACES)


@pytest.mark.parametrize("is_phi35", [False, True])
def test_llama_servers_chat_has_the_sources_ids(
    is_phi35: bool, example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What llama-server makes of messages with the template inside the file."""
    monkeypatch.setattr(llama_cpp, "CHAT_TEMPLATE", "")  # the file's
    folder = write_source(tmp_path / "source", example)
    if is_phi35:
        strip_behind(folder, "<|assistant|>", "</s>")
    checkpoint = Checkpoint.open(folder)
    (tmp_path / "out").mkdir()
    write_artifact(make_recipe("f16", model="tiny-phi3"), checkpoint, tmp_path / "out")
    template = jinja2.Template(checkpoint.tokenizer_config["chat_template"])
    text = template.render(messages=CONVERSATION, add_generation_prompt=True, eos_token="")
    expected = tokens.encode(tokens.read_tokenizer(checkpoint), text)
    model = llama_cpp.load(tmp_path / "out", "model.gguf", "cpu", Settings(256))
    try:
        with model._posting("/apply-template", {"messages": CONVERSATION}) as response:
            prompt = json.load(response)["prompt"]
        with model._posting("/tokenize", {"content": prompt, "parse_special": True}) as response:
            assert json.load(response)["tokens"] == expected
        # A server that is closed before its loop has begun to serve waits for ever.
        assert list(model.generate(expected, 1))
    finally:
        model.close()


# Names, stops, errors


def special(text: str, strips: bool) -> Token:
    return Token(text, -1000.0, TokenType.CONTROL, strips)


PHI3 = [special(text, False) for text in stripping.KEPT_BY_LLAMA_CPP]
PHI3 += [special(text, True) for text in ("</s>", "<|user|>", "<|assistant|>")]


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("phi-3-mini-4k", PHI3, "phi-3-mini-4k"),
        ("tiny-phi3", PHI3, "tiny-phi3"),
        ("my-model", PHI3, "phi-3 my-model"),
        ("phi-3.5-mini", [*PHI3, special("<|end|>", False)], "phi 3.5-mini"),
        ("Phi3-x", PHI3[:-3], "phi 3-x"),
    ],
)
def test_the_name_says_whether_llama_cpp_strips(
    name: str, found: list[Token], expected: str
) -> None:
    assert stripping.name_model(name, found) == expected


def test_a_stop_id_that_the_file_cannot_name_is_refused(example: Path, tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", example)
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text("utf-8"))
    generation["eos_token_id"] += [1986, 1987]
    path.write_text(json.dumps(generation), "utf-8")
    with pytest.raises(CheckpointError, match=r"<\|assistant\|>', '<\|placeholder1\|>'"):
        write_artifact(make_recipe("f16"), Checkpoint.open(folder), tmp_path)


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(
    example: Path, tmp_path: Path
) -> None:
    folder = write_source(tmp_path / "source", example, vocab_size=1990)
    with pytest.raises(CheckpointError, match=r"with id 1994; config\.json says vocab_size 1990"):
        write_artifact(make_recipe("f16"), Checkpoint.open(folder), tmp_path)


def test_unused_ids_are_padding(example: Path) -> None:
    found = vocabulary.read_vocabulary(example, 2048).tokens
    assert found[2047] == Token("[PAD2047]", -10000.0, TokenType.UNUSED)
    assert len(found) == 2048


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"type": "Unigram", "vocab": [["a", -1.5], ["b", -2.0]]}, "a Unigram tokenizer"),
        ({"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "a BPE neither over bytes"),
        (
            {"type": "BPE", "byte_fallback": True, "vocab": {"a": 0, "b": 1}, "merges": []},
            "a SentencePiece model without bytes",
        ),
        ({"type": "WordLevel", "vocab": {"a": 0, "b": 1}}, "a WordLevel tokenizer"),
    ],
)
def test_another_kind_of_tokenizer_keeps_its_texts(
    model: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}), "utf-8")
    found = vocabulary.read_vocabulary(tmp_path, 3)
    assert found.foreign.startswith(words)
    assert [token.text for token in found.tokens] == ["a", "b", "[PAD2]"]


def test_a_missing_or_damaged_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer.model nor tokenizer.json"):
        vocabulary.read_vocabulary(tmp_path, 10)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        vocabulary.read_vocabulary(tmp_path, 10)


@pytest.mark.parametrize("is_phi35", [False, True])
def test_the_modelfile_has_turns_stops_and_context(
    is_phi35: bool, example: Path, tmp_path: Path
) -> None:
    folder = write_source(tmp_path / "source", example)
    if is_phi35:
        strip_behind(folder, "<|assistant|>", "</s>")
    write_artifact(make_recipe("f16"), Checkpoint.open(folder), tmp_path)
    text = (tmp_path / "Modelfile").read_text("utf-8")
    assert text.startswith("FROM ./model.gguf\n")
    assert ('<|assistant|>\n"""' in text) is not is_phi35
    for stop in ("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"):
        assert f'PARAMETER stop "{stop}"' in text
    assert "PARAMETER num_ctx 256" in text
