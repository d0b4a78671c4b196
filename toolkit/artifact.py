"""An artifact: a folder whose manifest.json, written last, says what every byte is."""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from toolkit.errors import ArtifactError
from toolkit.progress import Advance, ignore

MANIFEST = "manifest.json"
SCHEMA = 1
# What renders a template that is carried: older ones let templates out of the sandbox.
REQUIREMENT = "jinja2>=3.1.6"
# What strftime_now says in chats while building, in seconds since 1970 (2025-01-01, noon): what is
# built and compared must not depend on the day.
BUILD_TIME = 1735732800.0
HASH_CHUNK_BYTES = 1 << 20
# Which tokenizer answers: the engine's own, or the source's by the package of this name.
ENGINE_TOKENIZER, SOURCE_TOKENIZER = "engine", "tokenizers"


class File(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the artifact."""

    path: str
    size_bytes: int
    sha256: str


class Source(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The checkpoint the artifact was made from; `digest` covers config and weights' headers.

    `adapter` is the digest of the LoRA adapter that came with it, which `digest` covers too.
    """

    model: str
    revision: str
    digest: str
    adapter: str = ""


class Template(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A Jinja template that no data can stand for, and why; `tokens` are its special tokens.

    `tool_use` is the one for chats with tools, where there is another. White space behind
    `strippers` is dropped. `roles` are those whose content the template writes.
    """

    text: str
    why: str
    tokens: dict[str, str] = {}
    tool_use: str = ""
    strippers: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()


class Chat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The checkpoint's chat template: text before and after each role's content, or the template.

    An empty message of a role in `skips_empty` writes nothing; behind the roles in `open_after`
    stands no generation prompt. `template` takes the place of all that where it is not None.
    """

    turns: dict[str, tuple[str, str]]
    generation: str
    stop_ids: tuple[int, ...]
    stop_texts: tuple[str, ...]
    bos_id: int | None = None
    skips_empty: tuple[str, ...] = ()
    open_after: tuple[str, ...] = ()
    template: Template | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that messages may have."""
        return tuple(self.turns) if self.template is None else self.template.roles

    @property
    def companions(self) -> tuple[str, ...]:
        """Packages that rendering chats needs on the device."""
        return () if self.template is None else (REQUIREMENT,)


class Smoke(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question that the deployed model must answer with `expect` in it, or at all if empty."""

    prompt: str
    expect: str
    max_tokens: int = 48


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is demanded of the artifact against its source, on the gate's text and on `check`'s.

    `max_kl` is the mean Kullback-Leibler divergence in nats per token; a recipe that leaves it out
    has the one of its precision (quality/limits.py). Without a limit unless they are set:
    `min_top1`, the share of tokens (0 to 1) whose most likely next token is the same, `max_kl_99`,
    the divergence that 99 % of the tokens do not exceed, and `max_perplexity_ratio`, the artifact's
    perplexity over the source's.
    """

    max_kl: float | None = None
    min_top1: float | None = None
    max_kl_99: float | None = None
    max_perplexity_ratio: float | None = None


class Measure(msgspec.Struct, frozen=True, kw_only=True):
    """One gate measurement: what was measured and the limit it met; `limit` None means no limit.

    `error` is the standard error of a mean.
    """

    name: str
    value: float
    limit: float | None
    ok: bool
    error: float | None = None


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of the gate. `checked` is False when the logits were skipped on request."""

    checked: bool
    runtime: str
    measures: tuple[Measure, ...] = ()


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """The text on which codes were chosen; `digest` covers its token ids."""

    text: str
    digest: str
    tokens: int


class Vision(msgspec.Struct, frozen=True, kw_only=True):
    """How pictures become crops of `image_size` pixels, with `side` x `side` tokens each."""

    image_size: int
    side: int
    crops: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Runtime(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What has to be on the device: an engine of the runner, its provider and package version.

    `properties` are what the engine has to be loaded with for the artifact to be its source,
    `companions` packages that it does not ask for itself, and that the artifact needs beside it.
    `tokenizer` is SOURCE_TOKENIZER where the engine's own would give other ids than the source's.
    """

    engine: str
    provider: str
    package: str
    version: str
    main_file: str
    properties: dict[str, str] = {}
    companions: tuple[str, ...] = ()
    tokenizer: str = ENGINE_TOKENIZER

    def warn_others(self) -> str:
        """What to add where another program runs the artifact; empty when it has the source's ids.

        Other programs take the engine's own tokenizer.
        """
        if self.tokenizer == ENGINE_TOKENIZER:
            return ""
        return "; its own tokenizer differs from the source's: see the manifest's notes"

    def tell_properties(self) -> str:
        """The properties, for people; empty where there are none."""
        return ", ".join(f"{key} {value}" for key, value in self.properties.items())


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an artifact says of itself."""

    schema: int
    name: str
    format: str
    plan_digest: str
    plan: dict[str, object]
    source: Source
    tools: dict[str, str]
    runtime: Runtime
    context_length: int
    valid_context: tuple[int, int]
    device_memory_bytes: int
    chat: Chat
    limits: Limits
    smoke: Smoke | None
    quality: Quality
    files: tuple[File, ...]
    notes: tuple[str, ...] = ()
    calibration: Calibration | None = None
    vision: Vision | None = None

    @property
    def size_bytes(self) -> int:
        """Sum of all files named, without the manifest itself."""
        return sum(file.size_bytes for file in self.files)


def make_safe(name: str, otherwise: str = "artifact") -> str:
    """Return a name that every shell and file system takes, without a dot or dash in front."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-") or otherwise


def hash_file(path: Path, advance: Advance = ignore) -> str:
    """Return the hex sha256 of a file, read in pieces of 1 MiB; `advance` is told the bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(HASH_CHUNK_BYTES):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def list_files(folder: Path, advance: Advance = ignore) -> tuple[File, ...]:
    """Hash every file below `folder` but the manifest, in order of path."""
    return tuple(
        File(
            path=path.relative_to(folder).as_posix(),
            size_bytes=path.stat().st_size,
            sha256=hash_file(path, advance),
        )
        for path in content_paths(folder)
    )


def content_paths(folder: Path) -> list[Path]:
    """Every file below `folder` but the manifest, in order of path."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json durably; it is the last file of an artifact."""
    with (folder / MANIFEST).open("wb") as stream:
        stream.write(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Read an artifact's manifest; ArtifactError when the folder is not a sealed artifact."""
    path = folder / MANIFEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise ArtifactError(
            f"{folder}: no {MANIFEST}: this folder is not a sealed artifact",
            advice="build one with: phiship build RECIPE --checkpoint DIR --out DIR",
        ) from None
    except msgspec.DecodeError as error:
        raise ArtifactError(
            f"{path}: damaged: {error}", advice="build the artifact again"
        ) from error


def verify_files(folder: Path, files: Iterable[File], advance: Advance = ignore) -> None:
    """Compare every file with the manifest; ArtifactError on the first difference."""
    for file in files:
        path = folder / file.path
        found_bytes = path.stat().st_size if path.is_file() else -1
        if found_bytes != file.size_bytes or hash_file(path, advance) != file.sha256:
            found = "missing" if found_bytes < 0 else f"{found_bytes} bytes, other content"
            raise ArtifactError(
                f"{path}: found {found}; the manifest says {file.size_bytes} bytes, "
                f"sha256 {file.sha256}",
                advice="build the artifact again",
            )
