"""The source's own tokenizer: the ids that every artifact has to give."""

import json
from contextlib import suppress
from pathlib import Path

from tokenizers import Tokenizer, __version__

from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.ranks import RANKS_FILE
from toolkit.errors import CheckpointError

PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Read tokenizer.json, or what stands for it; CheckpointError when it is missing or damaged."""
    path = checkpoint.tokenizer_folder / "tokenizer.json"
    if made := checkpoint.made_tokenizer:
        return Tokenizer.from_buffer(made)
    if not path.is_file():
        has_model = (checkpoint.tokenizer_folder / "tokenizer.model").is_file()
        found = "only tokenizer.model" if has_model else "no tokenizer"
        raise CheckpointError(
            f"{path}: missing; found {found}, and no {RANKS_FILE} to make it of",
            advice="make it with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)",
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(
            f"{path}: cannot be read: {_find_fault(path) or error}",
            advice="if it is whole, a newer package may know it: pip install --upgrade tokenizers",
        ) from error


def _find_fault(path: Path) -> str:
    """Which part of a tokenizer.json the package does not know; empty when that is not all."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return ""
    for part in PARTS if isinstance(content, dict) else ():
        with suppress(Exception):
            Tokenizer.from_str(json.dumps({**content, part: None}))
            steps = content[part].get("pretokenizers") or content[part].get("normalizers")
            kinds = [step.get("type") for step in steps or [content[part]]]
            return (
                f"{part} {', '.join(map(repr, kinds))}: tokenizers {__version__} does not know it"
            )
    return ""


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Source ids of `text`: special tokens parsed, nothing added in front or behind."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
