"""tokenizer.json made of a tiktoken file: byte-level BPE, whose tokens are their own merges.

A tiktoken file has a line a token: its bytes in base64, then its rank, which is its id. Phi-3-small
has one of these and, in the code published with it, a list of special tokens; nothing else.

Source: tiktoken's load.py and cl100k_base; tokenization_phi3_small.py of the published checkpoints;
GPT-2's table of characters that stand for bytes.
"""

import base64
import binascii
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from toolkit.errors import CheckpointError

RANKS_FILE = "cl100k_base.tiktoken"
BYTES = 256
# cl100k_base's pattern as tokenizers' regex engine takes it: it has no possessive quantifiers, and
# without them the matches are the same.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Behind the ranks, in this order; numbers stand for <|dummy_id_N|>, tokens that mean nothing.
FIRST_SPECIALS: tuple[str | int, ...] = (
    2, "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|system|>",
    "<|user|>", "<|assistant|>", 0, 1, "<|end|>", *range(3, 12), "<|endofprompt|>",
)  # fmt: skip
NEXT_DUMMY = 12


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a tiktoken file: every token's rank, 0 up; CheckpointError when it is damaged."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (binascii.Error, ValueError):
            raise _damaged(path, f"line {number} is not a token in base64 and its rank") from None
    missing = next((b for b in range(BYTES) if bytes([b]) not in ranks), None)
    if missing is not None:
        raise _damaged(path, f"byte {missing} has no token")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise _damaged(path, f"its {len(ranks)} tokens do not have the ranks 0 up, once each")
    return ranks


def list_specials(first: int, vocab: int) -> dict[int, str]:
    """Phi-3-small's special tokens by id, for ids from `first` (the number of ranks) to `vocab`."""
    count = max(0, vocab - first - len(FIRST_SPECIALS))
    named = (*FIRST_SPECIALS, *range(NEXT_DUMMY, NEXT_DUMMY + count))[: max(0, vocab - first)]
    return {
        first + place: name if isinstance(name, str) else f"<|dummy_id_{name}|>"
        for place, name in enumerate(named)
    }


def list_added(path: Path, vocab: int, listed: Mapping[int, str]) -> dict[int, str]:
    """The special tokens by id; what `listed` says of one counts before the published list."""
    return {**list_specials(len(read_ranks(path)), vocab), **listed}


def make_tokenizer(path: Path, vocab: int, listed: Mapping[int, str]) -> dict[str, Any]:
    """Make tokenizer.json's content; what `listed` says of special tokens counts before the rest.

    CheckpointError when the file is damaged, or its tokens do not go into `vocab` ids.
    """
    ranks = read_ranks(path)
    if len(ranks) > vocab:
        raise CheckpointError(
            f"{path}: found {len(ranks)} tokens; config.json's vocab_size allows {vocab}"
        )
    characters = _spell_bytes()

    def spell(token: bytes) -> str:
        return "".join(map(characters.__getitem__, token))

    ordered = sorted(ranks, key=ranks.__getitem__)
    merges = [_split(path, token, ranks) for token in ordered if len(token) > 1]
    specials = {**list_specials(len(ranks), vocab), **listed}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_describe(token, specials[token]) for token in sorted(specials)],
        "normalizer": None,
        "pre_tokenizer": _describe_splitting(),
        "post_processor": None,
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spell(token): ranks[token] for token in ordered},
            "merges": [[spell(left), spell(right)] for left, right in merges],
        },
    }


def _split(path: Path, token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that a token was merged of: what is left before its own rank's turn."""
    most = ranks[token]
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, most) for a, b in pairwise(parts)]
        best = min(pairs)
        if best >= most:
            raise _damaged(path, f"token {most} ({token!r}) is no merge of two before it")
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _spell_bytes() -> dict[int, str]:
    """GPT-2's characters for bytes: what can be printed as itself, the others from U+0100 on."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(BYTES) if byte not in printed]
    return {b: chr(b) for b in printed} | {b: chr(BYTES + at) for at, b in enumerate(others)}


def _describe(token: int, content: str) -> dict[str, Any]:
    """An added token, matched as it stands."""
    ways = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, **ways, "special": True}


def _describe_splitting() -> dict[str, Any]:
    """cl100k_base's pieces, then bytes as characters."""
    split = {"pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [{"type": "Split", **split}, _byte_level()]}


def _byte_level() -> dict[str, Any]:
    # The pattern has split already.
    return {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False
    }  # fmt: skip


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged: {reason}", advice="download this file again")
