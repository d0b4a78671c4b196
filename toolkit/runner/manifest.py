"""The part of manifest.json that the runner needs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .failure import Failure


@dataclass(frozen=True)
class Template:
    """A Jinja template that no data can stand for, and what its chats are rendered with.

    `tool_use` is the one for chats with tools, where there is another. White space behind
    `strippers` is dropped. `roles` are those whose content the template writes.
    """

    text: str
    tokens: dict[str, str] = field(default_factory=dict)
    tool_use: str = ""
    strippers: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chat:
    """Chat template as data: role -> (text before, text after), and the generation prompt.

    An empty message of a role in `skips_empty` writes nothing; behind the roles in `open_after`
    stands no generation prompt. `template` takes the place of all that where it is not None.
    """

    turns: dict[str, tuple[str, str]]
    generation: str
    stop_ids: tuple[int, ...]
    bos_id: int | None
    skips_empty: tuple[str, ...] = ()
    open_after: tuple[str, ...] = ()
    template: Template | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that messages may have."""
        return tuple(self.turns) if self.template is None else self.template.roles


@dataclass(frozen=True)
class Vision:
    """How pictures become crops of `image_size` pixels, with `side` x `side` tokens each."""

    image_size: int
    side: int
    crops: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Manifest:
    """What an artifact asks of its runner; `valid_context` is inclusive, in tokens.

    `version` is the one of the engine's package that the artifact was checked with; `properties`
    are what the engine has to be loaded with, most often nothing. `tokenizer` is "engine", or
    tokenizing.PACKAGE where the engine's own gives other ids than the source's.
    `vision` is None for a model that reads text only.
    """

    name: str
    engine: str
    provider: str
    version: str
    main_file: str
    context_length: int
    valid_context: tuple[int, int]
    device_memory_bytes: int
    chat: Chat
    properties: dict[str, str] = field(default_factory=dict)
    vision: Vision | None = None
    tokenizer: str = "engine"


def read_manifest(folder: Path) -> Manifest:
    """Read `folder`/manifest.json; Failure `artifact` when it is missing or incomplete."""
    path = folder / "manifest.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        runtime = data["runtime"]
        lowest, highest = data["valid_context"]
        return Manifest(
            name=data["name"],
            engine=runtime["engine"],
            provider=runtime["provider"],
            version=str(runtime["version"]),
            main_file=runtime["main_file"],
            context_length=int(data["context_length"]),
            valid_context=(int(lowest), int(highest)),
            device_memory_bytes=int(data["device_memory_bytes"]),
            chat=_read_chat(data["chat"]),
            properties={str(k): str(v) for k, v in runtime.get("properties", {}).items()},
            vision=_read_vision(data.get("vision")),
            tokenizer=str(runtime.get("tokenizer", "engine")),
        )
    except FileNotFoundError:
        raise Failure("artifact", f"{path}: not found: this folder is no artifact") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Failure("artifact", f"{path}: damaged: {error!r}") from error


def _read_chat(data: dict[str, Any]) -> Chat:
    template = data.get("template")
    return Chat(
        turns={role: (before, after) for role, (before, after) in data["turns"].items()},
        generation=data["generation"],
        stop_ids=tuple(data["stop_ids"]),
        bos_id=data.get("bos_id"),
        skips_empty=tuple(data.get("skips_empty", ())),
        open_after=tuple(data.get("open_after", ())),
        template=None if template is None else _read_template(template),
    )


def _read_template(data: dict[str, Any]) -> Template:
    return Template(
        text=data["text"],
        tokens={str(key): str(value) for key, value in data.get("tokens", {}).items()},
        tool_use=data.get("tool_use", ""),
        strippers=tuple(data.get("strippers", ())),
        roles=tuple(data.get("roles", ())),
    )


def _read_vision(data: dict[str, Any] | None) -> Vision | None:
    if data is None:
        return None
    mean, std = (tuple(map(float, data[key])) for key in ("mean", "std"))
    return Vision(int(data["image_size"]), int(data["side"]), int(data["crops"]), mean, std)
