"""How a byte-level BPE splits text into words: which of llama.cpp's ways is the source's.

GGUF carries no pattern, only the name of a way that llama.cpp knows (src/llama-vocab.cpp). Each way
is known here by the steps of the tokenizer.json that it stands for. Of names that mean the same one
is kept. Whether the ids are the same too is for proving.py to say.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# Other spellings of the same, as published tokenizers have them.
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _ENDINGS),
    ("'(?i:[sdmt]|ll|ve|re)", _ENDINGS),
    ("'(?:[sdmt]|ll|ve|re)", "'s|'t|'re|'ve|'m|'ll|'d"),
    ("?+", "?"),  # possessive: nothing behind it could match what it gives back
    ("++", "+"),
    ("{1}", ""),
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FRONT, _SPACES = r"[^\r\n\p{L}\p{N}]?", r"\s+(?!\S)|\s+"
_CASED = (f"{_FRONT}{_UPPER}*{_LOWER}+", f"{_FRONT}{_UPPER}+{_LOWER}*")
_SIGNS, _LINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+"
_SIGNS_O200K = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
_ASCII_SIGNS = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
_WIDE_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}+"
GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
# OpenAI's o200k_base, which Phi-4-mini has.
O200K = "|".join(
    (*(f"{cased}{_ENDINGS}?" for cased in _CASED), r"\p{N}{1,3}", _SIGNS_O200K, _LINES, _SPACES)
)


def _join(front: str, letters: str, *rest: str) -> str:
    return "|".join((*([front] if front else []), f"{_FRONT}{letters}", *rest))


LLAMA3 = _join(_ENDINGS, r"\p{L}+", r"\p{N}{1,3}", _SIGNS, _LINES, _SPACES)
QWEN2 = _join(_ENDINGS, r"\p{L}+", _DIGIT, _SIGNS, _LINES, _SPACES)
SEED_CODER = _join(_ENDINGS, r"\p{L}+", _DIGIT, r" ?[^\s\p{L}\p{N}\r\n]+", _LINES, _SPACES)
_LAST_SPACES = rf"{_WIDE_SPACES}|\s{{1,2}}(?!\S)|\s"
JAIS2 = _join(_ENDINGS, r"\p{L}+", r"\p{N}{1,3}", _SIGNS, _LINES, _LAST_SPACES)
_KOREAN = r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+"
_SIGNS_KOREAN = r" ?[^\s\p{L}\p{N}]+[\r\n/]?"
EXAONE = _join(_ENDINGS, _KOREAN, _DIGIT, _SIGNS_KOREAN, r"\s*[\r\n]", _SPACES)
_SIGNS_QWEN35 = r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
_MARKED = rf"{_ASCII_SIGNS}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+"


@dataclass(frozen=True)
class Way:
    """A way of llama.cpp's by its name; `steps` are those of tokenizer.json, as `list_steps` says.

    `takes_whole`: a word that is a token is that token, whatever the merges say (ignore_merges).
    """

    name: str
    steps: tuple[str, ...] = ()
    takes_whole: bool = False


WAYS = (
    Way("gpt-2", (GPT2,)),
    Way("smollm", (_DIGIT, GPT2)),
    Way("llama-bpe", (LLAMA3,), takes_whole=True),
    Way("dbrx", (LLAMA3,)),
    Way("qwen2", (QWEN2,)),
    Way("qwen35", (_join(_ENDINGS, r"[\p{L}\p{M}]+", _DIGIT, _SIGNS_QWEN35, _LINES, _SPACES),)),
    Way("tekken", ("|".join((*_CASED, _DIGIT, _SIGNS_O200K, _LINES, _SPACES)),), takes_whole=True),
    # llama.cpp's converter writes "gpt-4o" for o200k, whose pattern there leaves out \p{M}, as does
    # "tekken": of Hindi, Thai or vocalized Arabic it makes other tokens than the source. This name
    # stands for the same pattern with \p{M}, since May 2026 (pull request 22716).
    Way("granite-embed-multi-97m", (O200K,), takes_whole=True),
    Way("gpt-4o"),
    Way("deepseek-v3", (r"\p{N}{1,3}", _CJK, rf"{_MARKED}[\r\n]*|{_LINES}|{_SPACES}")),
    Way(
        "deepseek-coder",
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", _DIGIT),
    ),
    Way("deepseek-llm"),
    Way("falcon", ("punctuation, contiguous", GPT2, _DIGITS, "[0-9][0-9][0-9]")),
    Way("bloom", (BLOOM,)),
    Way("viking", (BLOOM, _DIGIT)),
    Way("minicpm5", (r"\p{N}{1,3}", LLAMA3.replace("{1,3}", "+")), takes_whole=True),
    Way("ufakzeka", (_join("", r"\p{L}+", _DIGIT, _SIGNS, _LINES, _SPACES),)),
    Way("seed-coder", (SEED_CODER,)),
    Way("bailingmoe", (_join(_ENDINGS, r"\p{L}+", _DIGIT, _SIGNS, r"\s*[\r\n]", _SPACES),)),
    Way("jais-2", (JAIS2,)),
    Way("exaone-moe", (EXAONE,)),
    Way("tiny_aya", (r"\d{1,3}(?=(?:\d{3})*\b)", O200K)),
    Way("spark2_5"),
    Way("youtu", takes_whole=True),
    Way("superbpe"),
    Way("kimi-k2"),
    Way("afmoe"),
    Way("laguna"),
    Way("chameleon"),
    Way("default"),
)


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """True for a BPE over bytes spelled as characters, as GPT-2 has it."""
    kinds = [step.get("type") for step in _flatten(tokenizer)]
    return tokenizer.get("model", {}).get("type") == "BPE" and "ByteLevel" in kinds


def recognize(tokenizer: Mapping[str, Any]) -> str:
    """tokenizer.ggml.pre of a byte-level BPE by its pattern; empty when no way has it."""
    steps, takes_whole = list_steps(tokenizer), bool(tokenizer["model"].get("ignore_merges"))
    found = [way for way in WAYS if way.steps and way.steps == steps]
    same = [way for way in found if way.takes_whole == takes_whole]
    return (same or found)[0].name if found else ""


def list_steps(tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    """What splits text in a tokenizer.json: patterns in one spelling, other steps in words."""
    return tuple(text for step in _flatten(tokenizer) if (text := _describe(step)))


def _flatten(tokenizer: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    step = tokenizer.get("pre_tokenizer") or {}
    yield from step.get("pretokenizers", [step])


def _describe(step: Mapping[str, Any]) -> str:
    kind = str(step.get("type"))
    if kind == "ByteLevel":
        front = "a space in front, " if step.get("add_prefix_space") else ""
        return front + (GPT2 if step.get("use_regex", True) else "")
    if kind == "Digits":
        return _DIGIT if step.get("individual_digits") else _DIGITS
    behavior = str(step.get("behavior", "")).lower()
    if kind == "Punctuation":
        return f"punctuation, {behavior}"
    if kind != "Split":
        return kind
    pattern = str(step.get("pattern", {}).get("Regex") or step.get("pattern"))
    for spelled, common in _SPELLINGS:
        pattern = pattern.replace(spelled, common)
    isolates = behavior == "isolated" or (behavior == "removed" and step.get("invert"))
    return pattern if isolates else f"{behavior}: {pattern}"
