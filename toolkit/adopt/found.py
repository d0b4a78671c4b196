"""What is found in an artifact made elsewhere, and how its fields are read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from toolkit.artifact import Chat
from toolkit.checkpoint import TOKENIZER_FILES, Checkpoint
from toolkit.checkpoint.config import Config, read_json
from toolkit.errors import ArtifactError, CheckpointError
from toolkit.quality.chat import find_ending, read_chat
from toolkit.quality.tokens import check_vocabulary, read_tokenizer

CONFIGS = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Given:
    """What is to be adopted; `tokenizer` is a folder whose tokenizer and chat template count."""

    path: Path
    name: str
    context_length: int | None = None
    tokenizer: Path | None = None
    provider: str | None = None

    def choose_provider(self, allowed: Sequence[str]) -> str:
        """The provider asked for, or the first; ArtifactError for one that the engine has not."""
        if self.provider is None or self.provider in allowed:
            return self.provider or allowed[0]
        raise ArtifactError(
            f"--provider: got {self.provider!r}; allowed for {self.path.name}: {', '.join(allowed)}"
        )

    def choose_context(self, largest: int, where: str) -> int:
        """The context asked for, or the largest; ArtifactError when the model has less."""
        if self.context_length is None or self.context_length <= largest:
            return self.context_length or largest
        raise ArtifactError(
            f"--context {self.context_length}: {where} allows {largest}",
            advice=f"give --context {largest} or less",
        )


@dataclass(frozen=True)
class Found:
    """All that a manifest says of an artifact; `files` are where their bytes lie now.

    `written` are small files that are added. `data_bytes` are in memory as long as the model is.
    """

    format: str
    engine: str
    provider: str
    package: str
    main_file: str
    files: Mapping[str, Path]
    chat: Chat
    context_length: int
    valid_context: tuple[int, int]
    data_bytes: int
    kv_bytes_per_token: int
    overhead_bytes: int
    notes: tuple[str, ...] = ()
    written: Mapping[str, str] = field(default_factory=dict)

    @property
    def device_memory_bytes(self) -> int:
        """Weights, the cache of the whole context, and the engine."""
        return self.memory_bytes(self.context_length)

    def memory_bytes(self, context_length: int) -> int:
        """The same with the cache of another context."""
        return self.data_bytes + self.kv_bytes_per_token * context_length + self.overhead_bytes


def require_file(path: Path, why: str) -> Path:
    """The path of a file that is there and not empty; ArtifactError says what names it."""
    if path.is_file() and path.stat().st_size:
        return path
    found = "is empty" if path.is_file() else "is missing"
    raise ArtifactError(
        f"{path}: {found}; {why}", advice="copy the folder again, whole, links followed"
    )


def resolve_beside(folder: Path, name: object, where: str) -> Path:
    """A file that a config names by a path within the folder; ArtifactError for any other."""
    if not isinstance(name, str) or not name:
        raise ArtifactError(f"{where}: got {name!r}; allowed the name of a file in the folder")
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts or "\\" in name:
        raise ArtifactError(f"{where}: got {name!r}; allowed a file within the folder")
    return require_file(folder / name, f"{where} names it")


def descend(config: Config, key: str) -> Config:
    """An object within a config, which errors then name; ArtifactError when it is none."""
    found = config.fields.get(key)
    where = f"{config.where}: {key}" if ": " not in config.where else f"{config.where}.{key}"
    if not isinstance(found, dict):
        raise ArtifactError(f"{where}: got {found!r}; allowed an object")
    return Config(where, found)


def read_config_file(path: Path) -> Config:
    """A JSON file as a Config."""
    return Config(str(path), read_json(path))


def read_ids(config: Config, key: str, vocab: int) -> tuple[int, ...]:
    """Token ids, one or a list of them, all below `vocab`; ArtifactError otherwise."""
    found = config.fields.get(key)
    ids = found if isinstance(found, list) else [found]
    if ids and all(type(one) is int and 0 <= one < vocab for one in ids):
        return tuple(dict.fromkeys(ids))
    raise ArtifactError(
        f"{config.where}: {key}: got {json.dumps(found)}; allowed ids from 0 to {vocab - 1}"
    )


def list_tokenizer(given: Given, *, needs: Sequence[str] = ("tokenizer.json",)) -> dict[str, Path]:
    """The tokenizer's files: those of --tokenizer, which are checked, before the folder's."""
    folders = [folder for folder in (given.path, given.tokenizer) if folder]
    files = {
        name: folder / name
        for folder in folders
        for name in TOKENIZER_FILES
        if (folder / name).is_file()
    }
    for name in needs:
        if name not in files:
            raise ArtifactError(
                f"{given.path / name}: missing",
                advice="give the source checkpoint's folder, which has it: --tokenizer DIR",
            )
    return files


def find_chat(given: Given, stop_ids: Sequence[int], vocab: int) -> tuple[Chat, tuple[str, ...]]:
    """The chat template as data, and what to know of its stops.

    `stop_ids` are those at which the artifact's own runtime ends; ours ends at the source's too.
    """
    folder = given.tokenizer or given.path
    fields: dict[str, Any] = {"eos_token_id": list(stop_ids)}
    checkpoint = Checkpoint(folder, Config(str(folder), fields), {})
    check_vocabulary(read_tokenizer(checkpoint), vocab, str(folder))
    try:
        chat = read_chat(checkpoint)
    except CheckpointError as error:
        raise ArtifactError(
            str(error),
            advice="give a folder that has the chat template: --tokenizer DIR",
        ) from error
    return add_stops(chat, stop_ids, checkpoint)


def add_stops(
    chat: Chat, stop_ids: Sequence[int], checkpoint: Checkpoint
) -> tuple[Chat, tuple[str, ...]]:
    """The chat with the runtime's stops too, and a note when the runtime lacks one of the chat's.

    ArtifactError when the text behind the assistant's turn is the text of none of them.
    """
    tokens = read_tokenizer(checkpoint).get_added_tokens_decoder()
    ids = tuple(dict.fromkeys([*stop_ids, *chat.stop_ids]))
    texts = tuple(tokens[one].content for one in ids if one in tokens)
    ending = find_ending(chat).strip()
    if ending and not any(text in ending for text in texts):
        raise ArtifactError(
            f"{checkpoint.folder}: stop ids: got {list(ids)} ({', '.join(texts) or 'no texts'}); "
            f"the chat template ends a turn with {ending!r}: answers would never stop",
            advice="the tokenizer is not the model's, or its config names the wrong eos_token_id",
        )
    missing = [tokens[one].content for one in ids if one in tokens and one not in stop_ids]
    notes = (
        f"the artifact's own config does not end at {', '.join(missing)}; phiship's runner does",
    )
    stops = msgspec.structs.replace(chat, stop_ids=ids, stop_texts=texts)
    return stops, notes if missing else ()
