"""A loaded artifact: its manifest, its engine's model, and what loading took."""

from __future__ import annotations

import importlib.metadata
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import engines
from .chat import check_template, prepare_template
from .failure import Failure
from .manifest import Manifest, read_manifest
from .memory import read_available_bytes
from .settings import Settings
from .tokenizing import PACKAGE, Retokenized, SourceTokenizer


@dataclass(frozen=True)
class Loaded:
    """A model that answers.

    `engine` is its package with its version, and the tokenizer's where that is not its own.
    """

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
    prepare_template(manifest.chat)
    engine = import_engine(manifest)
    check_template(manifest.chat)
    check_context(manifest, settings)
    check_memory(manifest)
    started_s = time.monotonic()
    tokenizer = find_tokenizer(artifact, manifest)
    options: dict[str, Any] = dict(manifest.properties)
    if tokenizer:
        options["has_tokenizer"] = False
    try:
        model = engine.load(artifact, manifest.main_file, manifest.provider, settings, **options)
    except Failure as failure:
        raise explain_age(failure, engine.PACKAGE, manifest.version) from None
    except (AttributeError, ImportError, TypeError) as error:  # an interface of another version
        reason = Failure("model", f"{artifact}: {engine.PACKAGE} cannot load it: {error}")
        raise explain_age(reason, engine.PACKAGE, manifest.version) from error
    load_seconds = time.monotonic() - started_s
    version = f"{engine.PACKAGE} {model.version}"
    if tokenizer:
        model = Retokenized(model, tokenizer)
        version += f" with {PACKAGE} {tokenizer.version}"
    try:
        yield Loaded(artifact, manifest, settings, model, version, load_seconds)
    finally:
        model.close()


def find_tokenizer(artifact: Path, manifest: Manifest) -> SourceTokenizer | None:
    """Return the source's own tokenizer where it answers; Failure when it cannot be had."""
    if manifest.tokenizer == "engine":
        return None
    if manifest.tokenizer != PACKAGE:
        raise Failure(
            "artifact",
            f"{manifest.name}: its tokenizer is {manifest.tokenizer!r}; this runner knows engine "
            f"and {PACKAGE}",
            "update phiship and deploy again",
        )
    return SourceTokenizer(artifact)


def check_context(manifest: Manifest, settings: Settings) -> None:
    """Raise Failure for a context beyond what the artifact was made and checked for.

    llama.cpp, for one, would choose LongRoPE's other factors for it, for every text.
    """
    highest = max(manifest.context_length, manifest.valid_context[1])
    if settings.context_tokens > highest:
        raise Failure(
            "settings",
            f"context_tokens is {settings.context_tokens}; {manifest.name} allows up to {highest}",
            "build it with a longer --context",
        )


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
            f"install it: python -m pip install {engine.PACKAGE}=={manifest.version}",
        ) from None
    return engine


def explain_age(failure: Failure, package: str, wanted: str) -> Failure:
    """Return why a model cannot be loaded; when the engine is too old, that it is."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return failure
    if failure.kind != "model" or _read_version(found) >= _read_version(wanted):
        return failure
    return Failure(
        "runtime",
        f"{failure}; {package} {found} is here, and the artifact was checked with {wanted}",
        f"update it: python -m pip install {package}=={wanted}",
    )


def _read_version(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)[:3]]
