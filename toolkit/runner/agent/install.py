"""Runtimes: virtual environments made of wheels that were pushed. Nothing is ever downloaded.

A runtime grows in a hidden folder, has to import its engine there, and gets its name last. It is
used by its bin/python alone: the scripts beside that still name the hidden folder.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from .. import engines
from ..failure import Failure, disk_full
from . import journal
from .blobs import hash_file
from .child import import_engine, run_child
from .durable import sync_folder, write_json
from .layout import Layout
from .releases import place_runtime

RECORD = "runtime.json"
WHEELS = "wheels"
INSTALL_TIMEOUT_S = 1800
PROBE_TIMEOUT_S = 30
# What engines written in C++ import with the first token only.
LATE_IMPORT = "numpy"
# Files take whole blocks; and what a package's RECORD, the environment and bytecode add.
BLOCK_BYTES = 4096
OVERHEAD_BYTES = 8_000_000
FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")


def install_runtime(
    layout: Layout, runtime: str, wheels: dict[str, str], engine: str
) -> dict[str, Any]:
    """Make runtimes/<runtime> of `wheels`, sha256 by file name, all of them blobs that are here.

    One of them is pip's own. A runtime that is there already and imports its engine stays; a broken
    one is made again. Returns its path and python, whether it was created, and what the engine says
    of itself. Failure when it cannot be made, or its engine cannot be imported: nothing stays then.
    """
    final, module = place_runtime(layout, runtime), engines.find_engine(engine).MODULE
    if _find_python(final).exists():
        imported = import_engine(module, str(_find_python(final)))
        if imported["importable"]:
            return _describe(final, imported, created=False)
    started_s = time.monotonic()
    fresh = Path(tempfile.mkdtemp(prefix=f".{runtime}.", suffix=".tmp", dir=str(layout.runtimes)))
    try:
        imported = _fill(layout, fresh, wheels, module)
        _publish(fresh, final)
    finally:
        shutil.rmtree(str(fresh), ignore_errors=True)
    seconds = round(time.monotonic() - started_s, 1)
    journal.log(layout, "installed", runtime=runtime, seconds=seconds)
    return _describe(final, imported, created=True)


def find_runtimes(layout: Layout) -> dict[str, Any]:
    """Return `runtimes`: of each, by name, its packages, Python, and whether that still runs."""
    found = {}
    for folder in sorted(layout.runtimes.iterdir()):
        record = _read_record(folder)
        if folder.name[0] != "." and record:
            found[folder.name] = {**record, "usable": _runs(folder, record["python_version"])}
    return {"runtimes": found}


def _fill(layout: Layout, fresh: Path, wheels: dict[str, str], module: str) -> dict[str, Any]:
    """Make the environment in `fresh`, and prove it by importing the engine."""
    installer, links = _link_wheels(layout, fresh / WHEELS, wheels)
    _check_space(layout, links)
    command = [sys.executable, "-m", "venv", "--without-pip", str(fresh)]
    _run("the virtual environment", command, fresh)
    _install(fresh, installer, links, wheels)
    _write_bytecode(fresh, module)
    imported = import_engine(module, str(_find_python(fresh)))
    if not imported["importable"]:
        raise _explain_import(imported, links)
    shutil.rmtree(str(fresh / WHEELS))
    write_json(fresh / RECORD, _make_record(links))
    return imported


def _link_wheels(layout: Layout, folder: Path, wheels: dict[str, str]) -> tuple[Path, list[Path]]:
    """Link blobs by their wheels' names, after hashing each; returns pip's wheel and the others."""
    folder.mkdir()
    links = []
    for name, sha256 in sorted(wheels.items()):
        blob = layout.find_blob(sha256)
        if Path(name).name != name or not name.endswith(".whl") or name.count("-") < 4:
            raise Failure("request", f"{name!r} is no name of a wheel")
        if not blob.is_file():
            raise Failure("request", f"{name}: blob {sha256} is not on the device")
        if hash_file(blob, lambda _: None) != sha256:
            raise Failure("corrupt", f"{name}: its blob is damaged", "deploy again: it is replaced")
        links.append(folder / name)
        links[-1].symlink_to(blob)
    installers = [link for link in links if _read_name(link)[0] == "pip"]
    if len(installers) != 1 or len(links) == 1:
        raise Failure("request", f"one wheel of pip and others are needed: {sorted(wheels)}")
    return installers[0], [link for link in links if link not in installers]


def _check_space(layout: Layout, links: list[Path]) -> None:
    """Fail before anything is written when the unpacked wheels cannot fit."""
    need_bytes = OVERHEAD_BYTES
    for link in links:
        with zipfile.ZipFile(str(link)) as archive:
            sizes = [entry.file_size for entry in archive.infolist()]
        need_bytes += sum(-(-size // BLOCK_BYTES) * BLOCK_BYTES for size in sizes)
    free_bytes = layout.count_free_bytes()
    if free_bytes < need_bytes:
        raise disk_full(f"{free_bytes} bytes are free, the runtime needs {need_bytes}")


def _install(fresh: Path, installer: Path, links: list[Path], wheels: dict[str, str]) -> None:
    """Run pip from its own wheel, on these files alone; it compares their hashes once more."""
    lines = [f"{_read_name(it)[0]} @ {it.as_uri()} --hash=sha256:{wheels[it.name]}" for it in links]
    requirements = fresh / WHEELS / "requirements.txt"
    requirements.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [str(_find_python(fresh)), "-I", "-B", str(installer / "pip"), "install"]
    command += ["--no-index", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--no-compile", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command += ["--no-warn-script-location", "--progress-bar=off"]
    _run("installing the runtime", [*command, "-r", str(requirements)], fresh)


def _write_bytecode(fresh: Path, module: str) -> None:
    """Let Python keep what it compiles for the engine, now, when it is made durable with the rest.

    All of it would be ten times as many files, never read. How this ends is for the import to say.
    """
    program = f"import {module}\nimport {LATE_IMPORT}"
    run_child([str(_find_python(fresh)), "-I", "-c", program], b"", INSTALL_TIMEOUT_S)


def _run(what: str, command: list[str], fresh: Path) -> None:
    """Run a command without the user's settings of pip and Python; Failure says how it ended."""
    settings = [name for name in os.environ if name.startswith(("PIP_", "PYTHON"))]
    clean = ["env", *(f"-u{name}" for name in settings)]
    clean += [f"PIP_CONFIG_FILE={os.devnull}", f"TMPDIR={fresh / WHEELS}"]
    done = run_child([*clean, *command], b"", INSTALL_TIMEOUT_S)
    if done["code"] == 0:
        return
    text = f"{done['stdout']}\n{done['stderr']}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line[len("ERROR: ") :] for line in lines if line.startswith("ERROR: ")]
    if any(words in text for words in FULL_WORDS):
        raise disk_full(errors[-1] if errors else lines[-1])
    if "No module named venv" in text:
        raise Failure(
            "runtime",
            f"{sys.executable} has no module venv",
            "install all of Python there (Debian: apt install python3), or name another one with "
            "`python:` in devices.yaml",
        )
    ended = f"was killed by {done['signal']}" if done["signal"] else "failed"
    if done["timeout_s"]:
        ended = f"took more than {INSTALL_TIMEOUT_S} s"
    raise Failure("runtime", f"{what} {ended}: {(errors or lines or ['no message'])[-1]}")


def _publish(fresh: Path, final: Path) -> None:
    """Give a finished runtime its name; what is on the disk then is all of it."""
    # One call for thousands of files: fsync of each takes minutes on an SD card.
    os.sync()
    broken = fresh.with_name(f"{fresh.name}.old.tmp")
    if final.exists():
        final.replace(broken)
    fresh.replace(final)
    sync_folder(final.parent)
    shutil.rmtree(str(broken), ignore_errors=True)


def _explain_import(imported: dict[str, Any], links: list[Path]) -> Failure:
    names = ", ".join("-".join(_read_name(link)) for link in links)
    if imported["signal"]:
        return Failure(
            "runtime",
            f"importing {imported['module']} is killed by {imported['signal']}: its wheel uses "
            f"instructions that this processor lacks, or is damaged ({names})",
            "build the artifact with another version of the runtime, or in another format",
        )
    return Failure(
        "runtime",
        f"{imported['module']} cannot be imported from its wheels ({names}): {imported['error']}",
        "a library of the system may be missing there (xllamacpp needs libgomp1)",
    )


def _make_record(links: list[Path]) -> dict[str, Any]:
    version = ".".join(str(number) for number in sys.version_info[:3])
    return {
        "packages": dict(_read_name(link) for link in links),
        "python": sys.executable,
        "python_version": version,
    }


def _read_record(folder: Path) -> dict[str, Any]:
    """Return what was recorded of a runtime; nothing for what is none."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record
    except (OSError, ValueError):
        return {}


def _runs(folder: Path, version: str) -> bool:
    """Tell whether a runtime's Python is still there, and still the one it was made with."""
    program = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
    if not _find_python(folder).exists():
        return False
    done = run_child([str(_find_python(folder)), "-I", "-c", program], b"", PROBE_TIMEOUT_S)
    return bool(done["code"] == 0 and done["stdout"].strip() == version)


def _describe(final: Path, imported: dict[str, Any], *, created: bool) -> dict[str, Any]:
    python = str(_find_python(final))
    return {"path": str(final), "python": python, "created": created, "engine": imported}


def _find_python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _read_name(wheel: Path) -> tuple[str, str]:
    """Return a wheel's package, in its normal form, and version."""
    name, version = wheel.name.split("-")[:2]
    return name.replace("_", "-").replace(".", "-").lower(), version
