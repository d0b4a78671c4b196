"""White space behind special tokens: where llama.cpp and the source's tokenizer part.

In the source each added token says by itself whether white space behind it is dropped (`rstrip`).
GGUF cannot say it. llama.cpp (src/llama-vocab.cpp) drops it behind every special token but <unk>,
<s> and <|endoftext|> when general.name contains "phi-3" or "phi3", and behind none otherwise. The
first is Phi-3 as published in April 2024; Phi-3.5 and later revisions keep it behind <|user|>,
<|system|> and <|end|> and fit neither. For them the name must not contain "phi-3", and the white
space is dropped from the text itself: in the chat template, and before a session tokenizes.
"""

import json
import re
from collections.abc import Iterable, Sequence

from toolkit.formats.gguf.vocabulary import Token, TokenType

STRIP_KEY = "phiship.tokenizer.strip_after"  # of our own: a JSON list of tokens
NAMES_THAT_STRIP = re.compile("phi-?3", re.IGNORECASE)
KEPT_BY_LLAMA_CPP = ("<unk>", "<s>", "<|endoftext|>")
STRIPPED_BY_LLAMA_CPP = ("</s>",)
LINE_BREAK = re.compile(r"\n|\\n")  # itself, or as a Jinja string spells it
HEAD, TAIL = "{% set rendered %}", "{% endset %}{{ rendered"  # around a wrapped chat template
SPECIAL = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)


def llama_cpp_agrees(tokens: Sequence[Token]) -> bool:
    """True when llama.cpp's rule for names with "phi-3" is the source's rule."""
    texts = {token.text for token in tokens}
    if not texts.issuperset((*KEPT_BY_LLAMA_CPP, *STRIPPED_BY_LLAMA_CPP)):
        return False  # llama.cpp looks these four up and does not load a file without one
    special = {token.text for token in tokens if token.kind in SPECIAL}
    expected = (special | {*STRIPPED_BY_LLAMA_CPP}) - {*KEPT_BY_LLAMA_CPP}
    return expected == {token.text for token in tokens if token.strips}


def name_model(name: str, tokens: Sequence[Token]) -> str:
    """general.name: with "phi-3" where llama.cpp's rule for such names fits, else without."""
    if not llama_cpp_agrees(tokens):
        return NAMES_THAT_STRIP.sub("phi 3", name)
    return name if NAMES_THAT_STRIP.search(name) else f"phi-3 {name}"


def texts_to_strip(tokens: Sequence[Token]) -> list[str]:
    """Tokens behind which white space must be dropped from the text itself."""
    if llama_cpp_agrees(tokens):
        return []
    return sorted(token.text for token in tokens if token.strips)


def strip_template(template: str, strippers: Iterable[str]) -> str:
    """Wrap a chat template so that what it renders has no white space behind `strippers`.

    Only what templates write is dropped: the one line break that follows a role.
    """
    used = [text for text in strippers if _appears(text, template)]
    if not used or not LINE_BREAK.search(template):
        return template
    filters = "".join(f" | replace({json.dumps(t + chr(10))}, {json.dumps(t)})" for t in used)
    return f"{HEAD}{template}{TAIL}{filters} }}}}"


def unwrap_template(template: str) -> str:
    """The template without what `strip_template` wrote around it, if it did."""
    inner, tail, _ = template.removeprefix(HEAD).rpartition(TAIL)
    return inner if tail and template.startswith(HEAD) else template


def _appears(text: str, template: str) -> bool:
    """Templates put <|role|> together from the role's name, so look for <|assistant|> always."""
    return text in template or text == "<|assistant|>"
