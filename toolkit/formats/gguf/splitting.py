"""How a byte-level BPE splits text into words: which of llama.cpp's ways is the source's.

GGUF carries no pattern, only the name of one that llama.cpp knows (src/llama-vocab.cpp).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from toolkit.errors import UnsupportedError

_ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FRONT = r"[^\r\n\p{L}\p{N}]?"
# OpenAI's o200k_base, which Phi-4-mini has: words by case with their endings, up to three digits,
# punctuation, line ends, spaces.
O200K = "|".join(
    (
        f"{_FRONT}{_UPPER}*{_LOWER}+{_ENDING}",
        f"{_FRONT}{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# llama.cpp's converter writes "gpt-4o", whose pattern there leaves out \p{M}: of Hindi, Thai or
# vocalized Arabic it makes other tokens than the source. This name stands for the same pattern with
# \p{M}, since May 2026 (pull request 22716).
NAMES = {O200K: "granite-embed-multi-97m"}


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """True for a BPE over bytes spelled as characters, as GPT-2 has it."""
    kinds = [step.get("type") for step in _list_steps(tokenizer)]
    return tokenizer.get("model", {}).get("type") == "BPE" and "ByteLevel" in kinds


def name_splitting(tokenizer: Mapping[str, Any], where: str) -> str:
    """tokenizer.ggml.pre; UnsupportedError when no pattern of llama.cpp's is the source's."""
    patterns = [
        step.get("pattern", {}).get("Regex")
        for step in _list_steps(tokenizer)
        if step.get("type") == "Split"
    ]
    if len(patterns) == 1 and patterns[0] in NAMES and not tokenizer.get("normalizer"):
        return NAMES[patterns[0]]
    raise UnsupportedError(
        f"{where}: pre_tokenizer: a byte-level BPE that splits text by {patterns or 'GPT-2 rules'}"
        f"; supported in GGUF: o200k's pattern, as Phi-4-mini has it",
        advice="choose another format: onnx, openvino and mlx take any tokenizer.json",
    )


def _list_steps(tokenizer: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    step = tokenizer.get("pre_tokenizer") or {}
    yield from step.get("pretokenizers", [step])
