"""Byte-level BPEs of the structures that people publish: llama.cpp gives their ids, or says no."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.bytelevel import BYTES, VOCAB, train_tokenizer, write_phi4_checkpoint
from toolkit import catalog
from toolkit.checkpoint import Checkpoint
from toolkit.families import read_decoder
from toolkit.formats.gguf import proving, splitting, vocabulary
from toolkit.quality.chat import read_chat
from toolkit.quality.tokenizing import Compared, compare_runtime

FRONT = r"[^\r\n\p{L}\p{N}]?"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CASED = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
TEKKEN = "|".join(f"{FRONT}{one}" for one in CASED) + rf"|\p{{N}}|{REST}".replace("]*|", "/]*|", 1)
DEEPSEEK_WORDS = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
    "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
WORDS = {**BYTES, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(pattern: str, behavior: str = "Isolated", *, invert: bool = False) -> dict[str, Any]:
    kind = {"pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    return {"type": "Split", **kind}


# As the files of the models have them.
PUBLISHED = {
    "gpt-2": [WORDS],
    "smollm": [DIGITS, WORDS],
    "llama-bpe": [split(rf"{ENDINGS}|{FRONT}\p{{L}}+|\p{{N}}{{1,3}}|{REST}"), BYTES],
    "qwen2": [split(rf"{ENDINGS}|{FRONT}\p{{L}}+|\p{{N}}|{REST}"), BYTES],
    "tekken": [split(TEKKEN), BYTES],
    "deepseek-v3": [
        split(r"\p{N}{1,3}"), split("[一-龥\u3040-ゟ゠-ヿ]+"), split(DEEPSEEK_WORDS), BYTES,
    ],
    "deepseek-coder": [
        split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-\ud7ff]+"),
        DIGITS, BYTES,
    ],
    "bailingmoe": [
        split(
            rf"'(?i:[sdmt]|ll|ve|re)|{FRONT}+\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|"
            r"\s*[\r\n]|\s+(?!\S)|\s+"
        ),
        BYTES,
    ],
}  # fmt: skip
WHOLE = ("llama-bpe", "tekken")  # whose files say ignore_merges


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer is replaced."""
    return write_phi4_checkpoint(tmp_path_factory.mktemp("base") / "source")


def put_tokenizer(base: Path, folder: Path, content: dict[str, Any]) -> Checkpoint:
    """A copy of a checkpoint with this tokenizer.json."""
    shutil.copytree(base, folder, copy_function=shutil.copy)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return Checkpoint.open(folder)


def compare(checkpoint: Checkpoint) -> Compared:
    """Compare llama.cpp's tokenizer with a checkpoint's."""
    recipe = catalog.load_recipe("phi-4-mini-gguf-q4_0")
    decoder = read_decoder(checkpoint.config)
    return compare_runtime(recipe, decoder, checkpoint, read_chat(checkpoint))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_splittings_have_the_sources_ids(name: str, base: Path, tmp_path: Path) -> None:
    content = train_tokenizer(PUBLISHED[name])
    content["model"]["ignore_merges"] = name in WHOLE
    assert splitting.recognize(content) == name
    found = compare(put_tokenizer(base, tmp_path / "source", content))
    assert not found.difference
    assert found.probes >= 100


def test_a_way_that_leaves_marks_apart_is_not_taken(base: Path, tmp_path: Path) -> None:
    """When llama.cpp mends tekken, this fails, and its own name will do."""
    content = train_tokenizer(PUBLISHED["tekken"])
    checkpoint = put_tokenizer(base, tmp_path / "source", content)
    found = vocabulary.read_vocabulary(checkpoint.folder, VOCAB)
    assert found.splitting == "tekken"
    assert proving.complete(found, checkpoint).splitting == "granite-embed-multi-97m"


def test_a_name_that_takes_words_whole_is_for_files_that_say_so() -> None:
    content = train_tokenizer(PUBLISHED["llama-bpe"])
    assert splitting.recognize(content) == "dbrx"


def test_an_unknown_pattern_is_proven_by_its_ids(base: Path, tmp_path: Path) -> None:
    """SmolLM's splitting, spelled as nobody does."""
    content = train_tokenizer([split(r"\p{Nd}|\p{Nl}|\p{No}"), split(splitting.GPT2), BYTES])
    assert not splitting.recognize(content)
    checkpoint = put_tokenizer(base, tmp_path / "source", content)
    found = vocabulary.read_vocabulary(checkpoint.folder, VOCAB)
    proof = proving.write_proven(tmp_path / "model.gguf", found, checkpoint)
    assert (proof.name, proof.differing) == ("smollm", 0)
    assert not compare(checkpoint).difference


def test_a_pattern_that_llama_cpp_lacks_is_told(base: Path, tmp_path: Path) -> None:
    checkpoint = put_tokenizer(base, tmp_path / "source", train_tokenizer([split(r"\w\w?"), BYTES]))
    found = compare(checkpoint)
    assert found.tokenizer == "tokenizers"
    assert "llama.cpp has no pre-tokenizer for this tokenizer.json; the nearest" in found.difference


def test_a_normalizer_is_seen_by_its_ids(base: Path, tmp_path: Path) -> None:
    """Qwen2 has NFC, which llama.cpp has not: letters with accents differ."""
    content = train_tokenizer(PUBLISHED["qwen2"], normalizer={"type": "NFC"})
    found = compare(put_tokenizer(base, tmp_path / "source", content))
    assert found.tokenizer == "tokenizers"
    assert any("e\u0301" in mismatch.text for mismatch in found.mismatches)


def test_every_way_is_one_that_llama_cpp_knows(base: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(base)
    path = tmp_path / "model.gguf"
    found = vocabulary.read_vocabulary(checkpoint.folder, VOCAB)
    proving.write_vocabulary(path, checkpoint, found)
    for way in splitting.WAYS:
        proving.GgufTokenizer(path, pre=way.name).close()
