"""How a model is loaded, and how tokens are chosen."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .failure import Failure

# Beside the manifest; `tune` writes it, for the machine it lies on alone.
FILE = "settings.json"


@dataclass(frozen=True)
class Settings:
    """What can be set when a model is loaded; None leaves the choice to the engine.

    `context_tokens` bounds prompt and answer together. `kv_bits` is the width of the KV cache,
    `batch_tokens` how many of a prompt's tokens go through the network at once.
    """

    context_tokens: int
    threads: int | None = None
    kv_bits: int | None = None
    batch_tokens: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the likeliest, whatever the rest says.

    Without a seed every answer is another.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


GREEDY = Sampling()


def check_offered(engine: str, settings: Settings, offered: dict[str, tuple[int, ...]]) -> None:
    """Raise Failure for a setting that the engine has not; () in `offered` allows any number."""
    for name, value in dataclasses.asdict(settings).items():
        if name == "context_tokens" or value is None:
            continue
        if name not in offered:
            raise Failure("settings", f"{engine} has no setting {name}", "leave it out")
        allowed = offered[name]
        if allowed and value not in allowed:
            texts = ", ".join(str(one) for one in allowed)
            raise Failure("settings", f"{engine}: {name} is {value}; allowed: {texts}")


def read_settings(artifact: Path, context_length: int, **given: int | None) -> Settings:
    """Return what is given, then what settings.json beside the manifest says, then defaults.

    `context_length` is what the context is otherwise.

    Failure when the file says something that no settings are.
    """
    stored = _read_file(artifact / FILE)
    chosen = {name: value for name, value in given.items() if value is not None}
    return Settings(**{"context_tokens": context_length, **stored, **chosen})


def _read_file(path: Path) -> dict[str, int]:
    return _parse(path.read_text(encoding="utf-8"), str(path)) if path.exists() else {}


def _parse(text: str, where: str) -> dict[str, int]:
    known = {field.name for field in dataclasses.fields(Settings)}
    try:
        data: dict[str, Any] = json.loads(text)["settings"]
        if not set(data) <= known or not all(_is_count(value) for value in data.values()):
            raise ValueError(f"{data}; allowed: counts of {', '.join(sorted(known))}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        advice = "remove it with: phiship tune --reset"
        raise Failure("settings", f"{where}: damaged: {error!r}", advice) from error
    return {name: value for name, value in data.items() if value is not None}


def _is_count(value: object) -> bool:
    return value is None or (type(value) is int and value > 0)
