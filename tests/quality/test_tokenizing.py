"""Which tokenizer answers: the engines' own beside the source's, before there are any weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RECIPES
from toolkit import catalog
from toolkit.artifact import Chat
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.probes import RARE_PROBES
from toolkit.errors import CheckpointError
from toolkit.families import read_decoder
from toolkit.quality.chat import read_chat
from toolkit.quality.tokenizing import Compared, compare_runtime

CHATML = Chat(
    turns={role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("user", "assistant")},
    generation="<|im_start|>assistant\n",
    stop_ids=(2,),
    stop_texts=("<|im_end|>",),
)


def compare(kind: str, folder: Path, chat: Chat | None = None) -> Compared:
    """Compare a format's tokenizer with a checkpoint's."""
    checkpoint, recipe = Checkpoint.open(folder), catalog.load_recipe(RECIPES[kind])
    decoder = read_decoder(checkpoint.config)
    return compare_runtime(recipe, decoder, checkpoint, chat or read_chat(checkpoint))


@pytest.mark.parametrize("kind", RECIPES)
def test_the_real_language_model(kind: str, real_lm: Path) -> None:
    """onnxruntime-genai alone differs, on accents that are characters of their own."""
    found = compare(kind, real_lm, CHATML)
    assert found.probes == 115
    if kind != "onnx":
        assert not found.difference
        return
    assert found.tokenizer == "tokenizers"
    assert len(found.mismatches) == 2
    assert all("e\u0301" in mismatch.text for mismatch in found.mismatches)


@pytest.mark.parametrize("kind", RECIPES)
def test_the_example_has_the_engines_own(kind: str, example: Path) -> None:
    found = compare(kind, example)
    assert found.tokenizer == "engine"
    assert found.notes == ()
    assert str(found).startswith("the engine's own: 0 of 106 probe texts differ")


def test_rare_texts_are_told_and_decide_nothing(example: Path) -> None:
    """When onnxruntime-genai mends this, the text can become one of those that decide."""
    found = compare("onnx", example)
    assert {mismatch.text for mismatch in found.rare} == {RARE_PROBES[-1]}
    assert str(found).endswith("; 1 of 3 rare texts do")


@pytest.mark.parametrize("scheme", ["", "never"])
def test_a_space_in_front_is_told_to_llama_cpp(scheme: str, example: Path, tmp_path: Path) -> None:
    """A normalizer does it in Phi-3; without it nothing, or Metaspace, which says whether."""
    folder = tmp_path / "source"
    shutil.copytree(example, folder, ignore=shutil.ignore_patterns("*.py", "tokenizer.model"))
    content = json.loads((folder / "tokenizer.json").read_bytes())
    prepend, *content["normalizer"]["normalizers"] = content["normalizer"]["normalizers"]
    assert prepend["type"] == "Prepend"
    if scheme:
        metaspace = {"replacement": "\u2581", "prepend_scheme": scheme, "split": False}
        content |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", **metaspace}}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert not compare("gguf", folder).difference


# What people's tokenizers are made of beside Phi-3's, on the example's vocabulary.
OTHERS: dict[str, dict[str, Any]] = {
    "Unigram": {},
    "WordPiece": {
        "unk_token": "<unk>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 99,
    },
    "WordLevel": {"unk_token": "<unk>"},
}  # fmt: skip


@pytest.mark.parametrize("model", OTHERS)
def test_llama_cpp_is_not_asked_for_what_it_lacks(
    model: str, example: Path, tmp_path: Path
) -> None:
    """It would end the process on a byte that has no token."""
    folder = tmp_path / "source"
    shutil.copytree(example, folder, ignore=shutil.ignore_patterns("*.py", "tokenizer.model"))
    content = json.loads((folder / "tokenizer.json").read_bytes())
    vocabulary: dict[str, int] = content["model"]["vocab"]
    content["model"] = {"type": model, "vocab": vocabulary, **OTHERS[model]}
    if model == "Unigram":
        ordered = sorted(vocabulary, key=vocabulary.__getitem__)
        scored = [[text, -place / 100] for place, text in enumerate(ordered)]
        content["model"] |= {"vocab": scored, "unk_id": 0, "byte_fallback": False}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    found = compare("gguf", folder)
    assert found.difference == f"llama.cpp has no tokenizer for a {model} tokenizer"
    # Nor is a runtime's own word lost.
    assert compare("onnx", folder).difference.startswith("onnxruntime-genai ")


def test_ids_beyond_the_vocabulary_are_refused(example: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(example, folder, ignore=shutil.ignore_patterns("*.py"))
    chat = read_chat(Checkpoint.open(folder))
    content = json.loads((folder / "tokenizer.json").read_bytes())
    added = {**content["added_tokens"][-1], "id": 5000, "content": "<|beyond|>"}
    content["added_tokens"].append(added)
    content["model"]["vocab"]["<|beyond|>"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has id 5000 \('<\|beyond\|>'\)"):
        compare("mlx", folder, chat)
