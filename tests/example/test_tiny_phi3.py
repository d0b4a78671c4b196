"""The committed tiny Phi-3: its files agree with one another. Needs neither torch nor transformers.

How well it answers is measured by `train.py --evaluate` and by the tests that run artifacts.
"""

import json
import re
import string
import struct
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from types import ModuleType
from typing import Any

import jinja2
import pytest
import sentencepiece
from tokenizers import Tokenizer

from tests.conftest import load_module

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny-phi3"
LARGEST_FOLDER_BYTES = 8_000_000
ADDED_TOKENS = (
    "<|endoftext|>",
    "<|assistant|>",
    *(f"<|placeholder{number}|>" for number in range(1, 5)),
    "<|system|>",
    "<|end|>",
    *(f"<|placeholder{number}|>" for number in range(5, 7)),
    "<|user|>",
)
PROBE_TEXTS = (
    "",
    " ",
    "a",
    " leading and trailing ",
    "runs  of   spaces" + " " * 40 + "end",
    "\ttabs\t\tand\n\nnew\r\nlines\n",
    "0 12 345 6789 3.14159 1e-9",
    "déjà vu, naïve, Größe, Ελληνικά, русский, עברית, हिन्दी, 漢字かな交じり, 한국어",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\ufeff\u00a0|",
    "def f(x: int) -> str:\n    return {'a': x ** 2}['a'] or f\"{x!r}\"  # comment\n",
    "<|not a token|> < |end| > <|end| |user|>",
    "\u2581\u2581 lower one eighth block",
    "\x00\x01\x7f",
)


def load_questions() -> ModuleType:
    return load_module("tiny_phi3_questions", FOLDER / "questions.py")


def read_json(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return content


def read_header() -> tuple[dict[str, Any], int]:
    """The safetensors header and the number of bytes after it."""
    with (FOLDER / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
        return header, (FOLDER / "model.safetensors").stat().st_size - 8 - length


def expected_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """What transformers' Phi3ForCausalLM calls its weights, by this config."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    qkv = head * (config["num_attention_heads"] + 2 * config["num_key_value_heads"])
    layer = {
        "input_layernorm.weight": [hidden],
        "post_attention_layernorm.weight": [hidden],
        "self_attn.qkv_proj.weight": [qkv, hidden],
        "self_attn.o_proj.weight": [hidden, hidden],
        "mlp.gate_up_proj.weight": [2 * inner, hidden],
        "mlp.down_proj.weight": [hidden, inner],
    }
    shapes = {
        f"model.layers.{number}.{name}": shape
        for number in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    shapes["model.embed_tokens.weight"] = [config["vocab_size"], hidden]
    shapes["model.norm.weight"] = [hidden]
    shapes["lm_head.weight"] = [config["vocab_size"], hidden]
    return shapes


@pytest.fixture(scope="module")
def questions() -> ModuleType:
    return load_questions()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def render(messages: list[dict[str, str]], **options: Any) -> str:
    config = read_json("tokenizer_config.json")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        config["chat_template"]
    )
    return template.render(messages=messages, eos_token=config["eos_token"], **options)


def test_folder_is_small_enough_to_commit() -> None:
    files = [path for path in FOLDER.rglob("*") if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= LARGEST_FOLDER_BYTES


def test_weights_are_those_the_config_describes() -> None:
    header, data_bytes = read_header()
    config = read_json("config.json")
    assert config["architectures"] == ["Phi3ForCausalLM"] and config["torch_dtype"] == "bfloat16"
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {name: tensor["shape"] for name, tensor in header.items()} == expected_shapes(config)
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert sum(end - start for start, end in (t["data_offsets"] for t in header.values())) == (
        data_bytes
    )


def test_sizes_suit_every_quantization() -> None:
    config = read_json("config.json")
    # K-quants work on super-blocks of 256 along a row.
    assert config["hidden_size"] % 256 == 0 and config["intermediate_size"] % 256 == 0
    # As in Phi-3-mini, the embedding has more rows than the tokenizer has tokens.
    tokens = Tokenizer.from_file(str(FOLDER / "tokenizer.json")).get_vocab_size()
    assert tokens < config["vocab_size"]


def test_added_tokens_follow_the_pieces(
    tokenizer: Tokenizer, pieces: sentencepiece.SentencePieceProcessor
) -> None:
    first = pieces.get_piece_size()
    listed = read_json("tokenizer_config.json")["added_tokens_decoder"]
    for number, token in enumerate(ADDED_TOKENS, first):
        assert encode(tokenizer, token) == [number] == [tokenizer.token_to_id(token)]
        assert listed[str(number)]["content"] == token
    assert tokenizer.get_vocab_size() == first + len(ADDED_TOKENS)
    assert [encode(tokenizer, token) for token in ("<unk>", "<s>", "</s>")] == [[0], [1], [2]]


def test_both_tokenizer_files_list_the_same_added_tokens() -> None:
    listed = read_json("tokenizer_config.json")["added_tokens_decoder"]
    added = read_json("tokenizer.json")["added_tokens"]
    assert {str(token.pop("id")): token for token in added} == listed


def test_stop_ids_name_the_stop_tokens(tokenizer: Tokenizer) -> None:
    stops = [tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|assistant|>", "<|end|>")]
    assert read_json("generation_config.json")["eos_token_id"] == stops
    assert read_json("config.json")["eos_token_id"] == stops[0]


def probe_texts(questions: ModuleType) -> Iterator[str]:
    yield from PROBE_TEXTS
    yield from (f"x{' ' * count}y" for count in range(1, 70))
    for question in questions.all_questions():
        yield question.prompt
        yield question.answer
    yield from topics.topics.values()


def test_both_forms_of_the_tokenizer_give_the_same_ids(
    tokenizer: Tokenizer, pieces: sentencepiece.SentencePieceProcessor, questions: ModuleType
) -> None:
    for text in probe_texts(questions):
        ids = encode(tokenizer, text)
        assert ids == pieces.encode(text), repr(text)
        # The tokenizer writes a space as U+2581, so that character itself comes back as one.
        assert tokenizer.decode(ids) == text.replace("\u2581", " ")


def test_every_mark_is_a_piece_with_its_space(pieces: sentencepiece.SentencePieceProcessor) -> None:
    # As in Phi-3's own tokenizer, digits apart. onnxruntime-genai splits text before the last space
    # of a run, so a mark without such a piece would get other ids there than here.
    marks = string.ascii_letters + string.punctuation
    assert all(pieces.piece_to_id(f"\u2581{mark}") != pieces.unk_id() for mark in marks)


def test_a_chat_is_its_segments_between_special_tokens(
    tokenizer: Tokenizer, pieces: sentencepiece.SentencePieceProcessor
) -> None:
    chat = render(
        [
            {"role": "system", "content": "  Be brief.\n"},
            {"role": "user", "content": "1 + 1\n\n=  ?"},
            {"role": "assistant", "content": "2"},
        ]
    )
    expected: list[int] = []
    for segment in re.split(r"(<\|\w+\|>)", chat):
        if segment in ADDED_TOKENS:
            expected += encode(tokenizer, segment)
        else:
            # Every one of these tokens but <|endoftext|> swallows the whitespace after it.
            expected += pieces.encode(segment.lstrip())
    assert encode(tokenizer, chat) == expected
    assert tokenizer.encode(chat).ids == [1, *expected]


def test_the_chat_template_renders_phi3_turns() -> None:
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    asked = "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n"
    assert render(turns, add_generation_prompt=True) == asked + "<|assistant|>\n"
    answered = render([*turns, {"role": "assistant", "content": "A"}])
    assert answered == asked + "<|assistant|>\nA<|end|>\n<|endoftext|>"


def test_held_out_questions_are_never_trained_on(questions: ModuleType) -> None:
    trained, held_out = questions.training_questions(), questions.held_out_questions()
    prompts = {question.prompt for question in trained}
    assert len(prompts) == len(trained)
    assert not prompts & {question.prompt for question in held_out}
    assert len(held_out) > 0.05 * len(trained)
    assert "What is the capital of France?" in prompts


def test_held_out_sums_are_not_trained_on_in_another_order_or_phrasing(
    questions: ModuleType,
) -> None:
    def addends(kind: list[Any]) -> set[frozenset[str]]:
        sums = (question.prompt for question in kind if question.kind == "sum")
        return {frozenset(re.findall(r"\d+", prompt)) for prompt in sums}

    held_out = addends(questions.held_out_questions())
    assert held_out and not held_out & addends(questions.training_questions())


def test_held_out_facts_are_trained_on_in_another_phrasing(questions: ModuleType) -> None:
    worked_out = {"sum", "count"}
    answers = {(q.kind, q.answer) for q in questions.training_questions()}
    facts = [q for q in questions.held_out_questions() if q.kind not in worked_out]
    assert facts and all((q.kind, q.answer) in answers for q in facts)
