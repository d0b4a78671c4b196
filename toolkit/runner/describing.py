"""What an artifact is, and whether this machine can run it; nothing is loaded."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

from . import engines
from .benching import read_machine
from .chat import check_template
from .loading import import_engine
from .manifest import read_manifest
from .memory import read_available_bytes
from .settings import read_settings


def describe(artifact: Path) -> dict[str, Any]:
    """Return the artifact's name, engine, limits and settings; Failure when it cannot run here."""
    manifest = read_manifest(artifact)
    engine = import_engine(manifest)
    check_template(manifest.chat)
    adapter = manifest.properties.get("adapter")
    return {
        "name": manifest.name,
        "engine": f"{engine.PACKAGE} {_find_version(engine.PACKAGE)}",
        "provider": manifest.provider,
        **({"adapter": adapter} if adapter else {}),
        "tokenizer": manifest.tokenizer,
        "valid_context": list(manifest.valid_context),
        "settings": dataclasses.asdict(read_settings(artifact, manifest.context_length)),
        "offered": engine.OFFERED,
        "device_memory_bytes": manifest.device_memory_bytes,
        "available_memory_bytes": read_available_bytes(),
        "roles": sorted(manifest.chat.roles),
        "machine": read_machine(),
        "engines": engines.list_engines(),
    }


def _find_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
