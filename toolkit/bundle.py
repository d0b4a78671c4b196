"""A bundle: an artifact for a phone's or Mac's app, with checksums, memory table and a how-to."""

import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from toolkit import fileio
from toolkit.adopt import inspect
from toolkit.adopt.found import Given
from toolkit.artifact import MANIFEST, Manifest, hash_file, read_manifest, verify_files
from toolkit.console import Console, format_bytes
from toolkit.errors import ArtifactError, UnsupportedError
from toolkit.howto import write_howto
from toolkit.preflight import rebuild_plan
from toolkit.progress import Advance
from toolkit.report import Report
from toolkit.staging import check_free_disk

# What runs on a platform, best first: format/provider, and the runtime that does.
PLATFORMS: dict[str, dict[str, str]] = {
    "android": {
        "onnx/cpu": "onnxruntime-genai for Java and Kotlin",
        "genie/npu": "Qualcomm's Genie",
        "genie/gpu": "Qualcomm's Genie",
        "genie/cpu": "Qualcomm's Genie",
    },
    "ios": {
        "mlx/metal": "MLX Swift",
        "onnx/cpu": "onnxruntime-genai for Objective-C and Swift",
    },
    "macos": {
        "mlx/metal": "MLX Swift",
        "onnx/cpu": "onnxruntime-genai for Objective-C and Swift",
    },
}
MODEL, SUMS, MEMORY, HOWTO = "model", "SHA256SUMS", "MEMORY.md", "HOWTO.md"
SHORTEST_CONTEXT = 256
STORED_AT = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip file can say
PIECE_BYTES = 1 << 20


def bundle(
    artifact: Path, out: Path, console: Console, report: Report, *,
    platform: str | None = None, as_zip: bool = False, accept_unchecked: bool = False,
) -> Path:  # fmt: skip
    """Write the folder `out`/NAME-PLATFORM, or NAME-PLATFORM.zip, and return its path.

    Without a platform it is the first that runs the artifact. UnsupportedError when the platform
    does not run it, ArtifactError when the artifact is damaged or the place is taken; nothing
    appears at the final path then.
    """
    with report.step("check artifact") as step:
        manifest = read_manifest(artifact)
        _require_checked(artifact, manifest, accept_unchecked)
        _require_plain(artifact, manifest)
        chosen = choose_platform(manifest, platform)
        with console.progress("verify", manifest.size_bytes) as bar:
            verify_files(artifact, manifest.files, bar)
        way = find_way(manifest)
        step.measured = f"{way} for {chosen}: {PLATFORMS[chosen][way]}"
    final = out / f"{manifest.name}-{chosen}{'.zip' if as_zip else ''}"
    if final.exists():
        raise ArtifactError(f"{final} exists", advice="remove it, or choose another --out")
    with _growing(final, manifest.size_bytes) as temporary, report.step("write") as step:
        texts = {**write_texts(artifact, manifest, chosen), SUMS: write_sums(artifact, manifest)}
        with console.progress("bundle", manifest.size_bytes) as bar:
            if as_zip:
                _write_zip(temporary, final.stem, artifact, manifest, texts, bar)
            else:
                _write_folder(temporary, artifact, manifest, texts, bar)
        size_bytes = _measure(temporary)
        step.measured = f"{final}, {format_bytes(size_bytes)}"
    return final


def _require_plain(artifact: Path, manifest: Manifest) -> None:
    """UnsupportedError for what an app would have to load the model with."""
    if asked := manifest.runtime.tell_properties():
        has_adapter = "adapter" in manifest.runtime.properties
        raise UnsupportedError(
            f"{artifact}: is its source only when loaded with {asked}, of which a bundle's how-to "
            "says nothing",
            advice="bundle an artifact with its adapter merged" if has_adapter else "",
        )


def choose_platform(manifest: Manifest, platform: str | None) -> str:
    """The platform asked for, or the first that fits; UnsupportedError says what it would run."""
    way = find_way(manifest)
    if manifest.vision:
        why = ", of which a bundle's how-to and memory table say nothing"
        if manifest.format == "mlx":
            why = "; what an app loads MLX with, MLXLLM, knows models of text alone"
        raise UnsupportedError(
            f"{manifest.name}: it reads pictures{why}",
            advice="serve it where its runtime is: phiship run ARTIFACT --serve",
        )
    names = [platform] if platform else list(PLATFORMS)
    for name in names:
        if way in PLATFORMS[name]:
            return name
    offered = "; ".join(f"{name} runs {', '.join(PLATFORMS[name])}" for name in names)
    raise UnsupportedError(
        f"{manifest.name}: it is {way}; {offered}",
        advice="build one of these: phiship list shows the recipes; devices with SSH take "
        "artifacts by phiship deploy",
    )


def find_way(manifest: Manifest) -> str:
    """What runs the artifact, as format/provider; an MLX artifact for the CPU runs on Metal too."""
    return (
        "mlx/metal"
        if manifest.format == "mlx"
        else f"{manifest.format}/{manifest.runtime.provider}"
    )


def list_memory(artifact: Path, manifest: Manifest) -> list[tuple[int, int]]:
    """(context length, predicted bytes of memory), contexts doubling up to the artifact's own.

    From the plan that made the artifact, or from its own files when it was adopted.
    """
    contexts = [*_double(manifest.context_length), manifest.context_length]
    if plan := rebuild_plan(manifest):
        return [(n, replace(plan, context_length=n).device_memory_bytes) for n in contexts]
    found = inspect(Given(artifact, manifest.name, provider=manifest.runtime.provider))
    return [(n, found.memory_bytes(n)) for n in contexts]


def write_texts(artifact: Path, manifest: Manifest, platform: str) -> dict[str, str]:
    """Every text of the bundle by name but the sums."""
    rows = "".join(
        f"| {context:,} | {format_bytes(memory)} |\n"
        for context, memory in list_memory(artifact, manifest)
    )
    first, last = manifest.valid_context
    notes = "".join(f"- {note}\n" for note in manifest.notes)
    memory = (
        f"# Memory of {manifest.name}\n\nPredicted: weights, the cache of keys and values, and the "
        "engine. The app's own memory comes on top.\n\n"
        f"| context (tokens) | memory |\n|---|---|\n{rows}\n"
        f"Answers agree with the source's from {first:,} to {last:,} tokens.\n{notes}"
    )
    return {MEMORY: memory, HOWTO: write_howto(manifest, platform)}


def write_sums(artifact: Path, manifest: Manifest) -> str:
    """Lines for `sha256sum -c` in the bundle's folder: the manifest's, which no copy can change."""
    sums = {file.path: file.sha256 for file in manifest.files}
    sums[MANIFEST] = hash_file(artifact / MANIFEST)
    return "".join(f"{sums[path]}  {MODEL}/{path}\n" for path in sorted(sums))


def _require_checked(artifact: Path, manifest: Manifest, accept_unchecked: bool) -> None:
    if not manifest.quality.checked and not accept_unchecked:
        raise ArtifactError(
            f"{artifact}: sealed as unchecked: nobody has compared it with its source",
            advice="check it with: phiship check ARTIFACT, or give --accept-unchecked",
        )


def _double(context_length: int) -> Iterator[int]:
    context = SHORTEST_CONTEXT
    while context < context_length:
        yield context
        context *= 2


@contextmanager
def _growing(final: Path, size_bytes: int) -> Iterator[Path]:
    """A temporary path beside the final one, moved there when the block ends without an error."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        check_free_disk(final.parent, size_bytes)
        yield temporary
        temporary.rename(final)
        fileio.sync_folder(final.parent)
    except OSError as error:
        raise fileio.explain_write_error(error) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _write_folder(
    folder: Path, artifact: Path, manifest: Manifest, texts: dict[str, str], advance: Advance
) -> None:
    for name in _list_names(manifest):
        target = folder / MODEL / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with (artifact / name).open("rb") as source, target.open("wb") as stream:
            _copy(source, stream, advance)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fileio.sync(path)


def _write_zip(
    path: Path, root: str, artifact: Path, manifest: Manifest, texts: dict[str, str],
    advance: Advance,
) -> None:  # fmt: skip
    """Entries in order of name, without times; weights do not shrink, so all are stored."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name in sorted(texts):
            archive.writestr(_entry(f"{root}/{name}"), texts[name].encode())
        for name in _list_names(manifest):
            entry = _entry(f"{root}/{MODEL}/{name}")
            entry.file_size = (artifact / name).stat().st_size
            with (artifact / name).open("rb") as source, archive.open(entry, "w") as stream:
                _copy(source, stream, advance)
    fileio.sync(path)


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, STORED_AT)
    entry.create_system = 3  # Unix, on every host
    entry.external_attr = 0o644 << 16
    return entry


def _list_names(manifest: Manifest) -> list[str]:
    return sorted([*(file.path for file in manifest.files), MANIFEST])


def _copy(source: IO[bytes], stream: IO[bytes], advance: Advance) -> None:
    while piece := source.read(PIECE_BYTES):
        stream.write(piece)
        advance(len(piece))


def _measure(path: Path) -> int:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sum(one.stat().st_size for one in files)
