"""A small tokenizer of Phi-4-mini's structure, and a checkpoint that has it.

A byte-level BPE that splits as o200k does, in tokenizer.json alone, with the published files' added
tokens, unused ids and chat template; trained on texts of this repository. Ids are those of the
published tokenizer less 198,718.
"""

import codecs
import contextlib
import importlib
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers, trainers

from tests.checkpoints import Dtype, random_weights, variant_config, write_safetensors
from toolkit.quality.tokens import PROBES

BASE_TOKENS = 1280
VOCAB = 1344  # the last ids are unused, as in the published model
END_OF_TEXT = BASE_TOKENS + 1
END_OF_TURN = BASE_TOKENS + 22
# Text, special; white space behind all but the first two is dropped. They follow each other, after
# placeholders that are no added tokens: the tokenizers library numbers added tokens by itself.
PLACEHOLDERS = ("98", "", *(f"{number:02}" for number in range(18)))
ADDED = (
    ("<|endoftext|>", True),
    ("<|endofprompt|>", True),
    ("<|assistant|>", True),
    ("<|end|>", True),
    ("<|user|>", True),
    ("<|system|>", True),
    ("<|tool|>", False),
    ("<|/tool|>", False),
    ("<|tool_call|>", False),
    ("<|/tool_call|>", False),
    ("<|tool_response|>", False),
    ("<|tag|>", True),
)
BYTES = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
}  # fmt: skip
PARTS = ("truncation", "padding", "normalizer", "post_processor")
KEPT_BEHIND = ("<|endoftext|>", "<|endofprompt|>")
# o200k_base's pattern, as openai's tiktoken has it.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
    "message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + "
    "'<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + "
    "message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
# Scripts with marks that the pattern counts to their letters, often enough to be merged.
MARKED = ("नमस्ते दुनिया ", "สวัสดี ", "e\u0301 ", "مُحَمَّد ")


def write_phi4_checkpoint(folder: Path, dtype: Dtype = "bf16", seed: int = 0) -> Path:
    """Write the variant phi4_mini with this tokenizer into `folder` and return `folder`."""
    folder.mkdir(parents=True)
    ids = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT}
    config = {**variant_config("phi4_mini", dtype), **ids, "vocab_size": VOCAB}
    generation = {**ids, "eos_token_id": [END_OF_TURN, END_OF_TEXT]}
    for name, content in (
        ("config", config),
        ("generation_config", generation),
        ("tokenizer", make_tokenizer()),
        ("tokenizer_config", describe_tokenizer()),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    write_safetensors(folder / "model.safetensors", random_weights(config, seed), dtype)
    return folder


@cache
def make_tokenizer() -> dict[str, Any]:
    """tokenizer.json: the trained merges with Phi-4-mini's added tokens at ids with gaps."""
    pattern = {"pattern": {"Regex": PATTERN}, "behavior": "Removed", "invert": True}
    return train_tokenizer([{"type": "Split", **pattern}, BYTES])


def train_tokenizer(steps: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """tokenizer.json that splits text in these steps, with Phi-4-mini's added tokens; `more` of it.

    The steps are as tokenizer.json spells them.
    """
    pre_tokenizer = {"type": "Sequence", "pretokenizers": steps}
    parts = {**dict.fromkeys(PARTS), "pre_tokenizer": pre_tokenizer, "decoder": BYTES, **more}
    model = {"type": "BPE", "vocab": {}, "merges": []}
    empty = {"version": "1.0", "added_tokens": [], "model": model, **parts}
    tokenizer = Tokenizer.from_str(json.dumps(empty))
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_TOKENS,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    # Steps that leave few pairs have fewer merges.
    vocabulary |= {f"<|unused{place}|>": place for place in range(len(vocabulary), BASE_TOKENS)}
    texts = [*(f"<|endoftext{number}|>" for number in PLACEHOLDERS), "<|endofprompt|>"]
    vocabulary |= {text: BASE_TOKENS + place for place, text in enumerate(texts)}
    return content | {"added_tokens": list_added()}


def describe_tokenizer() -> dict[str, Any]:
    """tokenizer_config.json."""
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(entry.pop("id")): entry for entry in list_added()},
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "tokenizer_class": "GPT2Tokenizer",
        **ends,
    }


def list_added() -> list[dict[str, Any]]:
    """The added tokens as tokenizer.json lists them."""
    ids = [END_OF_TEXT, *range(END_OF_TURN - 2, END_OF_TURN + len(ADDED) - 3)]
    return [
        {
            "id": token_id,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": text not in KEPT_BEHIND,
            "normalized": False,
            "special": special,
        }
        for token_id, (text, special) in zip(ids, ADDED, strict=True)
    ]


def _texts() -> list[str]:
    zen = _read_zen()
    return [zen, codecs.encode(zen, "rot13"), *PROBES, *(text * 3 for text in MARKED)]


def _read_zen() -> str:
    """The Zen of Python, a text that is the same in every Python."""
    with contextlib.redirect_stdout(io.StringIO()):  # the module prints itself when imported
        module = importlib.import_module("this")
    return codecs.decode(module.s, "rot13")
