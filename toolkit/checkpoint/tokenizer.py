"""The source's own tokenizer: the ids that every artifact has to give."""

from tokenizers import Tokenizer

from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.ranks import RANKS_FILE
from toolkit.errors import CheckpointError


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Read tokenizer.json, or what stands for it; CheckpointError when it is missing or damaged."""
    path = checkpoint.folder / "tokenizer.json"
    if made := checkpoint.made_tokenizer:
        return Tokenizer.from_buffer(made)
    if not path.is_file():
        has_model = (checkpoint.folder / "tokenizer.model").is_file()
        found = "only tokenizer.model" if has_model else "no tokenizer"
        raise CheckpointError(
            f"{path}: missing; found {found}, and no {RANKS_FILE} to make it of",
            advice="make it with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)",
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Source ids of `text`: special tokens parsed, nothing added in front or behind."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
