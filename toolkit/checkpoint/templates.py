"""A checkpoint's chat templates: where transformers looks for them, and the tokens they may write.

Source: `_from_pretrained` and `get_chat_template` in transformers' tokenization_utils_base.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.checkpoint import MORE_TEMPLATES, TEMPLATE_FILE, Checkpoint
from toolkit.checkpoint.config import read_json
from toolkit.errors import CheckpointError

DEFAULT, TOOL_USE = "default", "tool_use"
SPECIAL_TOKENS = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)
MOST_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class Source:
    """The template for chats and the one for chats with tools, empty where it is the same.

    `where` names the first in errors, `tokens` are the special tokens that both may write.
    """

    where: str
    text: str
    tool_use: str
    tokens: dict[str, str]

    @property
    def bos(self) -> str:
        """Text of the bos token; empty when there is none."""
        return self.tokens.get("bos_token", "")


def read_source(checkpoint: Checkpoint) -> Source:
    """Find the templates; CheckpointError when there is none, or none for chats without tools."""
    where, named = _list_templates(checkpoint)
    text, tool_use = named.get(DEFAULT), named.get(TOOL_USE, "")
    if text is None:
        raise CheckpointError(
            f"{where}: found the chat templates {', '.join(named)}; none is named {DEFAULT}",
            advice=f"save the template for plain chats as {TEMPLATE_FILE}",
        )
    for one in (text, tool_use):
        if len(one) > MOST_CHARACTERS:
            raise CheckpointError(
                f"{where}: the chat template has {len(one)} characters; allowed {MOST_CHARACTERS}"
            )
    return Source(where, text, tool_use, read_special_tokens(checkpoint))


def read_special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """The texts of the named special tokens that the checkpoint has, by name."""
    path = checkpoint.tokenizer_folder / "special_tokens_map.json"
    fields: dict[str, Any] = read_json(path) if path.is_file() else {}
    fields |= {key: value for key, value in checkpoint.tokenizer_config.items() if value}
    tokens = {name: fields[name] for name in SPECIAL_TOKENS if fields.get(name)}
    return {n: t["content"] if isinstance(t, dict) else str(t) for n, t in tokens.items()}


def list_files(folder: Path) -> dict[str, Path]:
    """The template files of a folder by name; they win over tokenizer_config.json."""
    files = {one.stem: one for one in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    single = folder / TEMPLATE_FILE
    return {DEFAULT: single, **files} if single.is_file() else files


def _list_templates(checkpoint: Checkpoint) -> tuple[str, dict[str, str]]:
    """Where the templates stand, and all of them by name."""
    if files := list_files(checkpoint.tokenizer_folder):
        first = files.get(DEFAULT, checkpoint.tokenizer_folder / MORE_TEMPLATES)
        return str(first), {name: _read_text(path) for name, path in files.items()}
    where = f"{checkpoint.tokenizer_folder / 'tokenizer_config.json'}: chat_template"
    found = checkpoint.tokenizer_config.get("chat_template")
    if isinstance(found, str):
        return where, {DEFAULT: found}
    if isinstance(found, list):
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
    if not isinstance(found, dict) or not found or not _are_texts(found):
        raise CheckpointError(
            f"{where}: got {checkpoint.tokenizer_config.get('chat_template')!r}; allowed a "
            "template, or a list of templates with names",
            advice=f"add {TEMPLATE_FILE} to the checkpoint",
        )
    return where, found


def _are_texts(named: dict[Any, Any]) -> bool:
    return all(isinstance(one, str) for pair in named.items() for one in pair)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
