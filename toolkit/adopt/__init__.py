"""Adopt an artifact made elsewhere: look at it, and seal it in a folder of its own.

Nothing of the original changes: its files are linked, or copied where that does not go. Whether
it is the model it claims to be is known only when there is a checkpoint to compare it with.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

import msgspec

from toolkit import __version__, artifact, formats
from toolkit.adopt import genie, gguf, mlx, onnx, openvino
from toolkit.adopt.found import Found, Given
from toolkit.artifact import (
    SOURCE_TOKENIZER,
    Limits,
    Manifest,
    Quality,
    Runtime,
    Smoke,
    Source,
    make_safe,
)
from toolkit.checkpoint import Checkpoint
from toolkit.console import Console, format_bytes
from toolkit.errors import ArtifactError, CheckpointError, SettingsError, UnsupportedError
from toolkit.families import read_decoder
from toolkit.quality.chat import read_chat
from toolkit.quality.gate import run_gate
from toolkit.quality.limits import choose_limit
from toolkit.quality.tokenizing import TOKENIZER_MEMORY, Compared, choose_encode, compare_folder
from toolkit.report import Report
from toolkit.runner.tokenizing import FILE as TOKENIZER_FILE
from toolkit.source import open_source
from toolkit.staging import check_free_disk, stage

# A file that only this kind of folder has; looked for in this order.
MARKS: dict[str, ModuleType] = {
    onnx.CONFIG: onnx,
    genie.CONFIG: genie,
    openvino.MAIN: openvino,
    "model.safetensors": mlx,
    "model.safetensors.index.json": mlx,
}
SMOKE = Smoke(prompt="What is the capital of France?", expect="Paris")
ADOPTED = "adopted"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
DEEPEST = 3
SHOWN_FOLDERS = 6


@dataclass(frozen=True)
class Wish:
    """How to adopt: a name, a context, a question; `replace` an artifact of that name.

    `checkpoint`, a folder or a Hugging Face id, is the source that it is compared with.
    """

    name: str | None = None
    context_length: int | None = None
    tokenizer: Path | None = None
    provider: str | None = None
    smoke: Smoke = SMOKE
    checkpoint: str | None = None
    replace: bool = False
    copy: bool = False


def adopt(path: Path, out: Path, wish: Wish, console: Console, report: Report) -> Path:
    """Seal what lies at `path` as `out`/NAME, and return that folder.

    It is checked only when there is a checkpoint to compare it with. ArtifactError or
    UnsupportedError name file, key, found and allowed, GateError says what differs from the source;
    nothing is left then.
    """
    name = wish.name or _choose_name(path)
    if not NAME.fullmatch(name):
        raise SettingsError(
            f"--name: got {name!r}; allowed letters, digits, dashes, dots and underscores"
        )
    with report.step("inspect") as step:
        found = inspect(
            Given(_find(path), name, wish.context_length, wish.tokenizer, wish.provider)
        )
        step.measured = (
            f"{found.format}, {len(found.files)} files, context {found.context_length}, stops "
            f"{', '.join(found.chat.stop_texts)}, "
            f"{format_bytes(found.device_memory_bytes)} of memory on a device"
        )
    final = out / name
    if final.exists() and not wish.replace:
        raise ArtifactError(f"{final} exists", advice="give another --name or --out, or --replace")
    with stage(out, name, ADOPTED) as staging:
        with report.step("take") as step:
            step.measured = _take(found, staging.folder, wish.copy, console)
        manifest = _describe(name, found, wish.smoke)
        if wish.checkpoint:
            manifest = _check(found, staging.folder, manifest, wish.checkpoint, console, report)
        with report.step("seal") as step:
            sealed = staging.publish(manifest, console)
            step.measured = f"{len(sealed.files)} files, {format_bytes(sealed.size_bytes)}"
    return final


def inspect(given: Given) -> Found:
    """Look at what is given; ArtifactError or UnsupportedError when it cannot be adopted."""
    with _as_artifact():
        if given.path.is_file():
            return gguf.inspect(given)
        for mark, module in MARKS.items():
            if (given.path / mark).is_file():
                found: Found = module.inspect(given)
                return found
    raise ArtifactError(
        f"{given.path}: found none of {', '.join(MARKS)}, and no one GGUF file",
        advice=_suggest(given.path),
    )


@contextmanager
def _as_artifact() -> Iterator[None]:
    """It is no checkpoint whose files are read here."""
    try:
        yield
    except CheckpointError as error:
        raise ArtifactError(str(error), advice=error.advice) from error


def _find(path: Path) -> Path:
    """The folder, or the GGUF file; ArtifactError for what is sealed already, or not there."""
    if not path.exists():
        raise ArtifactError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix != gguf.SUFFIX:
            raise ArtifactError(
                f"{path}: got a file of kind {path.suffix or 'none'}; allowed a folder, or a file "
                f"{gguf.SUFFIX}"
            )
        return path
    if (path / artifact.MANIFEST).is_file():
        raise ArtifactError(
            f"{path}: has a {artifact.MANIFEST}: it is sealed already",
            advice=f"deploy it as it is: phiship deploy {path} DEVICE",
        )
    files = sorted(path.glob(f"*{gguf.SUFFIX}"))
    if len(files) > 1:
        names = ", ".join(one.name for one in files)
        raise ArtifactError(f"{path}: several GGUF files ({names})", advice="give one of them")
    return files[0] if files else path


def _suggest(folder: Path) -> str:
    """Folders below that look like artifacts, such as those of a repository that holds several."""
    pattern = "/".join(["*"] * DEEPEST)
    below = {
        found.parent
        for mark in MARKS
        for depth in range(1, DEEPEST + 1)
        for found in folder.glob(f"{pattern[: 2 * depth]}{mark}")
    }
    if not below:
        return "give the folder in which these files lie"
    names = [str(one) for one in sorted(below)]
    return f"give one of: {', '.join(names[:SHOWN_FOLDERS])}"


def _choose_name(path: Path) -> str:
    stem = path.resolve().name.removesuffix(gguf.SUFFIX)
    return make_safe(stem, ADOPTED)


def _take(found: Found, folder: Path, copies: bool, console: Console) -> str:
    """Link every file, or copy it, and write what is added; returns what was done."""
    links, copied_bytes = 0, 0
    total = sum(path.stat().st_size for path in found.files.values())
    if copies or any(_is_far(path, folder) for path in found.files.values()):
        check_free_disk(folder, total)
    with console.progress("take", total) as bar:
        for name, path in found.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not copies and _link(path.resolve(), target):
                links += 1
            else:
                shutil.copyfile(path, target)
                copied_bytes += target.stat().st_size
            bar(target.stat().st_size)
    for name, text in found.written.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return f"{links} files linked, {format_bytes(copied_bytes)} copied"


def _is_far(path: Path, folder: Path) -> bool:
    return path.stat().st_dev != folder.stat().st_dev


def _link(path: Path, target: Path) -> bool:
    """Make a hard link; False where that does not go, or the file could not be made durable."""
    if not os.access(path, os.W_OK):
        return False
    try:
        os.link(path, target)
    except OSError:
        return False
    return True


def _describe(name: str, found: Found, smoke: Smoke) -> Manifest:
    """The manifest, but for the list of files."""
    return Manifest(
        schema=artifact.SCHEMA,
        name=name,
        format=found.format,
        plan_digest="",
        plan={},
        source=Source(model=ADOPTED, revision=ADOPTED, digest=_digest(found.files)),
        tools={"phiship": __version__, "engine": ADOPTED},
        runtime=Runtime(
            engine=found.engine,
            provider=found.provider,
            package=found.package,
            version=_version(found.package.removesuffix("-cuda")),
            main_file=found.main_file,
            companions=found.chat.companions,
        ),
        context_length=found.context_length,
        valid_context=found.valid_context,
        device_memory_bytes=found.device_memory_bytes,
        chat=found.chat,
        limits=Limits(max_kl=choose_limit(0)),  # nothing says how many bits it has
        smoke=smoke,
        quality=Quality(checked=False, runtime="none: it was adopted"),
        files=(),
        notes=found.notes,
    )


def _check(
    found: Found, folder: Path, manifest: Manifest, reference: str, console: Console,
    report: Report,
) -> Manifest:  # fmt: skip
    """The manifest with what the gate measured; GateError when it is not the source's model."""
    if found.format not in formats.names():
        raise UnsupportedError(
            f"--checkpoint: {found.package} does not run here, so that nothing can be compared",
            advice="adopt it without; it is sealed as unchecked then",
        )
    with report.step("source") as step:
        checkpoint = open_source(reference, console)
        decoder = read_decoder(checkpoint.config)
        checkpoint.check(decoder)
        step.measured = str(checkpoint.folder)
    if found.format == "mlx" and found.valid_context[0] > 1:
        decoder = decoder.with_long_rope()
    chat = read_chat(checkpoint)
    with report.step("tokenizer") as step:
        tokens = compare_folder(found.format, folder, decoder, checkpoint, chat)
        step.measured = str(tokens)
    if tokens.tokenizer == SOURCE_TOKENIZER:
        manifest = _take_tokenizer(manifest, folder, checkpoint, tokens)
    with report.step("gate") as step:
        session = formats.get(found.format).open_session(folder)
        try:
            quality = run_gate(
                session, checkpoint, decoder, chat, manifest.limits,
                check_logits=True, smoke=manifest.smoke, console=console,
                context_length=found.context_length,
                encode=choose_encode(tokens.tokenizer, folder, session.encode),
            )  # fmt: skip
        finally:
            session.close()
        measured = [one for one in quality.measures if one.limit is not None]
        step.measured = "\n".join(f"{one.name} {one.value:.3g}" for one in measured)
        step.limit = "\n".join(f"{one.limit:g}" for one in measured)
    digest = checkpoint.fingerprint()
    source = Source(model=ADOPTED, revision=checkpoint.revision, digest=digest)
    return msgspec.structs.replace(manifest, quality=quality, source=source)


def _take_tokenizer(
    manifest: Manifest, folder: Path, checkpoint: Checkpoint, tokens: Compared
) -> Manifest:
    """Put the source's tokenizer.json into the folder; returns the manifest that says so."""
    (folder / TOKENIZER_FILE).unlink(missing_ok=True)  # it may be a link to the original
    content = checkpoint.tokenizer_contents()[TOKENIZER_FILE]
    (folder / TOKENIZER_FILE).write_bytes(content)
    runtime = msgspec.structs.replace(
        manifest.runtime,
        tokenizer=tokens.tokenizer,
        companions=(*manifest.runtime.companions, SOURCE_TOKENIZER),
    )
    return msgspec.structs.replace(
        manifest,
        runtime=runtime,
        device_memory_bytes=manifest.device_memory_bytes + TOKENIZER_MEMORY * len(content),
        notes=(*manifest.notes, *tokens.notes),
    )


def _digest(files: Mapping[str, Path]) -> str:
    """Of names and sizes: what was adopted, as far as it can be told without reading all of it."""
    lines = [f"{name} {path.stat().st_size}" for name, path in sorted(files.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _version(package: str) -> str:
    """The version that is installed here, as that of a build; empty when there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
