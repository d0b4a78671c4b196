"""The tokenizer as llama.cpp wants it: text, score and type of every id.

Follows Phi3MiniModel.set_vocab of llama.cpp's converter. For Phi-3 it needs tokenizer.model; here a
checkpoint with tokenizer.json alone will do, since its merges carry the same order. Phi-4-mini has
a byte-level BPE, which tokenizer.json alone holds.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from toolkit.checkpoint.config import read_json
from toolkit.errors import CheckpointError, require
from toolkit.formats.gguf.splitting import is_byte_level, recognize

SENTENCEPIECE, BYTE_LEVEL = "llama", "gpt2"
PADDING_SCORE = -10000.0
ADDED_SCORE = -1000.0


class TokenType(IntEnum):
    """llama_token_type (llama.h); SentencePiece numbers its types alike."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Token:
    """An entry of the vocabulary; `strips` says that the source drops white space behind it."""

    text: str
    score: float
    kind: TokenType
    strips: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of all ids, and how llama.cpp makes them of a text.

    `kind` is tokenizer.ggml.model and `splitting` tokenizer.ggml.pre, empty where none is known for
    the source's pattern. The order of a SentencePiece BPE is in its tokens' scores, that of a
    byte-level BPE in the checkpoint's merges. `foreign` says what llama.cpp has no tokenizer for:
    then the texts are right, and ids of a text are not to be had from it. `has_front` says that
    a SentencePiece tokenizer puts a space in front of a text.
    """

    kind: str
    splitting: str
    tokens: tuple[Token, ...]
    foreign: str = ""
    has_front: bool = True

    @property
    def is_byte_level(self) -> bool:
        """True when merges say in which order bytes are joined."""
        return self.kind == BYTE_LEVEL


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Every id below `size`, unused ones as [PADn]; CheckpointError when the tokenizer has more."""
    content = _read(folder / "tokenizer.json")
    has_pieces = (folder / "tokenizer.model").is_file()
    byte_level = is_byte_level(content) and not has_pieces
    foreign = "" if byte_level or has_pieces or not content else _find_foreign(content)
    tokens = {token_id: _padding(token_id) for token_id in range(size)}
    tokens |= _read_texts(content) if byte_level or foreign else _read_pieces(folder)
    tokens |= {i: _look(t) if byte_level else t for i, t in _read_added(folder).items()}
    if len(tokens) > size:
        last = max(tokens)
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokens[last].text!r} with id {last}; "
            f"config.json says vocab_size {size}"
        )
    if not byte_level and not foreign and not _has_bytes(tokens.values()):
        foreign = "a SentencePiece model without bytes for what it lacks"
    kind = BYTE_LEVEL if byte_level else SENTENCEPIECE
    splitting = recognize(content) if byte_level else "default"
    listed = tuple(tokens[token_id] for token_id in range(size))
    return Vocabulary(kind, splitting, listed, foreign, not content or _has_front(content))


def _has_front(content: dict[str, Any]) -> bool:
    """True when a tokenizer.json puts a space in front, by a normalizer or its pre-tokenizer."""
    normalizer, splitter = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    kinds = [step.get("type") for step in normalizer.get("normalizers", [normalizer])]
    steps = splitter.get("pretokenizers", [splitter])
    spaces = [step for step in steps if step.get("type") == "Metaspace"]
    return "Prepend" in kinds or any(it.get("prepend_scheme") != "never" for it in spaces)


def _find_foreign(content: dict[str, Any]) -> str:
    """What a tokenizer.json has that llama.cpp has no tokenizer for; empty for Phi-3's."""
    model = content.get("model", {})
    if model.get("type") != "BPE":
        return f"a {model.get('type')} tokenizer"
    return "" if model.get("byte_fallback") else "a BPE neither over bytes nor with bytes"


def _has_bytes(tokens: Iterable[Token]) -> bool:
    """True when each byte is a token: llama.cpp ends the process where it looks for one in vain."""
    return {token.text for token in tokens} >= {f"<0x{byte:02X}>" for byte in range(256)}


def _padding(token_id: int) -> Token:
    return Token(f"[PAD{token_id}]", PADDING_SCORE, TokenType.UNUSED)


def _read_pieces(folder: Path) -> dict[int, Token]:
    if (folder / "tokenizer.model").is_file():
        return _read_sentencepiece(folder / "tokenizer.model")
    if (folder / "tokenizer.json").is_file():
        return _read_merges(folder / "tokenizer.json")
    raise CheckpointError(
        f"{folder}: found neither tokenizer.model nor tokenizer.json",
        advice="copy the tokenizer's files beside the weights",
    )


def _read_texts(content: dict[str, Any]) -> dict[int, Token]:
    """Texts of a vocabulary; a byte-level BPE has their order in its merges."""
    vocabulary = content["model"].get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram's, with scores
        return {
            i: Token(text, float(score), TokenType.NORMAL)
            for i, (text, score) in enumerate(vocabulary)
        }
    return {i: Token(text, 0.0, TokenType.NORMAL) for text, i in vocabulary.items()}


def _look(token: Token) -> Token:
    """An added token as the converter takes it: what looks like <|this|> is no plain text."""
    if token.text.startswith("<|") and token.text.endswith("|>"):
        return replace(token, kind=TokenType.CONTROL)
    return token


def _read_sentencepiece(path: Path) -> dict[int, Token]:
    library = require("sentencepiece")
    try:
        model = library.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model: {error}") from error

    def kind(token_id: int) -> TokenType:
        for test, found in (
            (model.is_unknown, TokenType.UNKNOWN),
            (model.is_control, TokenType.CONTROL),
            (model.is_unused, TokenType.UNUSED),
            (model.is_byte, TokenType.BYTE),
        ):
            if test(token_id):
                return found
        return TokenType.NORMAL

    return {
        i: Token(model.id_to_piece(i), model.get_score(i), kind(i))
        for i in range(model.vocab_size())
    }


def _read_merges(path: Path) -> dict[int, Token]:
    """SentencePiece's score of a piece is minus the rank of the merge that makes it."""
    model = read_json(path)["model"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    return {
        token_id: _merged(text, ranks.get(text, len(ranks)), model.get("unk_token"))
        for text, token_id in model["vocab"].items()
    }


def _merged(text: str, rank: int, unknown: str | None) -> Token:
    if text == unknown:
        return Token(text, 0.0, TokenType.UNKNOWN)
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return Token(text, 0.0, TokenType.BYTE)
    return Token(text, -float(rank), TokenType.NORMAL)


def _read_added(folder: Path) -> dict[int, Token]:
    """Added tokens of all three files; the later file wins."""
    added: dict[int, Token] = {}
    for text, token_id in _read(folder / "added_tokens.json").items():
        added[token_id] = Token(text, ADDED_SCORE, TokenType.USER_DEFINED)
    decoder = _read(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    entries = [(int(token_id), entry) for token_id, entry in decoder.items()]
    listed = _read(folder / "tokenizer.json").get("added_tokens", [])
    entries += [(int(entry["id"]), entry) for entry in listed]
    for token_id, entry in entries:
        kind = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        added[token_id] = Token(entry["content"], ADDED_SCORE, kind, bool(entry.get("rstrip")))
    return added


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
