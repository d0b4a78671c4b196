"""A loaded artifact: its manifest, its engine's model, and what loading took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import engines
from .failure import Failure
from .manifest import Manifest, read_manifest
from .memory import read_available_bytes
from .settings import Settings


@dataclass(frozen=True)
class Loaded:
    """A model that answers; `engine` is its package with its version."""

    artifact: Path
    manifest: Manifest
    settings: Settings
    model: Any
    engine: str
    load_seconds: float


@contextmanager
def loading(artifact: Path, settings: Settings) -> Iterator[Loaded]:
    """Load an artifact for the length of the block; Failure when it cannot run here."""
    manifest = read_manifest(artifact)
    engine = import_engine(manifest)
    check_memory(manifest)
    started_s = time.monotonic()
    model = engine.load(artifact, manifest.main_file, manifest.provider, settings)
    load_seconds = time.monotonic() - started_s
    version = f"{engine.PACKAGE} {model.version}"
    try:
        yield Loaded(artifact, manifest, settings, model, version, load_seconds)
    finally:
        model.close()


def check_memory(manifest: Manifest) -> None:
    """Raise Failure before a model is loaded that does not fit; swapping would stop the device.

    The manifest counts weights, the engine, and the cache of the artifact's whole context. Of a
    graphics card's own memory nothing is known.
    """
    available_bytes, need_bytes = read_available_bytes(), manifest.device_memory_bytes
    if manifest.provider == "cuda" or available_bytes is None or available_bytes >= need_bytes:
        return
    raise Failure(
        "memory",
        f"{manifest.name} needs {need_bytes / 1e9:.2f} GB of memory; "
        f"{available_bytes / 1e9:.2f} GB are available",
        "stop other programs, or take an artifact with fewer bits or a shorter context",
    )


def import_engine(manifest: Manifest) -> Any:
    """Return the engine's module; Failure when its package is missing."""
    engine = engines.find_engine(manifest.engine)
    try:
        engines.import_package(engine)
    except ImportError as error:
        raise Failure(
            "runtime",
            f"{manifest.name} runs in {engine.PACKAGE}, which cannot be imported: {error}",
            f"install it: python -m pip install {engine.PACKAGE}",
        ) from None
    return engine
