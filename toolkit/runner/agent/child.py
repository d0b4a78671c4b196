"""Work that may crash runs in a child process, whose end is reported by name."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..failure import Failure
from .layout import Layout
from .releases import RUNNER, RUNTIME

STDERR_TAIL_CHARACTERS = 2000
IMPORT_TIMEOUT_S = 120
LOG_BYTES = 1 << 20
LOG_TAIL_CHARACTERS = 20_000

_running: set[int] = set()


def run_child(command: list[str], stdin: bytes, timeout_s: float) -> dict[str, Any]:
    """Run a command; returns code, signal (name or None), stdout, and the end of stderr."""
    # A group of its own, so that nothing it starts outlives it.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    _running.add(process.pid)
    try:
        stdout, stderr = process.communicate(stdin, timeout_s)
    except subprocess.TimeoutExpired:
        _kill_group(process.pid)
        _, stderr = process.communicate()
        return _describe(None, b"", stderr, timeout_s)
    finally:
        _running.discard(process.pid)
    return _describe(process.returncode, stdout, stderr, None)


def kill_running() -> None:
    """Kill every child with all it has started."""
    for pid in list(_running):
        _kill_group(pid)


def name_signal(number: int) -> str:
    """Return a signal's name: 4 -> 'SIGILL'."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def ask_release(
    layout: Layout, artifact: Path, prompt: bytes, max_tokens: int, timeout_s: float
) -> dict[str, Any]:
    """Let a release's own runner answer; `answer` is its JSON, None when it printed none."""
    if not (artifact / RUNNER).is_file():
        raise Failure("request", f"{artifact}: no release is deployed there")
    command = [*find_python(artifact), "-B", str(artifact / RUNNER), "generate", "--json"]
    command += ["--artifact", str(artifact), "--max-tokens", str(max_tokens)]
    done = run_child(command, prompt, timeout_s)
    try:
        answer = json.loads(done.pop("stdout").strip().rpartition("\n")[2])
    except ValueError:
        answer = None
    error = (answer or {}).get("error", {}).get("message", "")
    _log(layout, artifact.resolve().name, f"{done['stderr']}{error}")
    return {**done, "answer": answer}


def find_python(artifact: Path) -> list[str]:
    """Return the Python of a release: of its runtime, and nothing else, or the one that runs us."""
    own = artifact / RUNTIME / "bin" / "python"
    return [str(own), "-I"] if (artifact / RUNTIME).is_symlink() else [sys.executable]


# Two lines of JSON, the first before anything can crash; engines may print in between.
IMPORT_PROGRAM = """
import importlib, importlib.metadata, importlib.util, json, sys
name = sys.argv[1]
print(json.dumps({"is_installed": importlib.util.find_spec(name) is not None}), flush=True)
version = getattr(importlib.import_module(name), "__version__", "")
try:
    version = str(version) or importlib.metadata.version(name)
except importlib.metadata.PackageNotFoundError:
    pass
print(json.dumps({"version": version}))
"""


def import_engine(module: str, python: str = sys.executable) -> dict[str, Any]:
    """Import an engine's module; some wheels die there with an illegal instruction.

    `is_installed` tells one that is there and fails from one that is missing.
    """
    done = run_child([python, "-B", "-c", IMPORT_PROGRAM, module], b"", IMPORT_TIMEOUT_S)
    version = re.search(r'^{"version": "(.*)"}$', done["stdout"], re.MULTILINE)
    importable = done["code"] == 0 and version is not None
    is_installed = '{"is_installed": true}' in done["stdout"]
    error = done["stderr"].strip().rpartition("\n")[2] or "no message"
    if done["timeout_s"]:  # nothing is known of what it printed; what is missing fails at once
        is_installed, error = True, f"not done within {done['timeout_s']:.0f} s"
    return {
        "module": module,
        "importable": importable,
        "is_installed": is_installed,
        "version": version.group(1) if importable and version else "",
        "signal": done["signal"],
        "error": "" if importable else error,
    }


def read_log(layout: Layout) -> str:
    """Return the end of what runners said."""
    path = layout.logs / "runner.log"
    return (
        path.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL_CHARACTERS:]
        if (path.exists())
        else ""
    )


def _log(layout: Layout, release: str, text: str) -> None:
    """Keep a runner's last words; the file before the last LOG_BYTES is kept too."""
    if not text.strip():
        return
    path = layout.logs / "runner.log"
    if path.exists() and path.stat().st_size > LOG_BYTES:
        path.replace(path.with_name("runner.log.1"))
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"--- {now} {release}\n{text.rstrip()}\n")


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _describe(
    code: int | None, stdout: bytes, stderr: bytes, timeout_s: float | None
) -> dict[str, Any]:
    return {
        "code": code,
        "signal": name_signal(-code) if code is not None and code < 0 else None,
        "timeout_s": timeout_s,
        "stdout": stdout.decode("utf-8", "replace"),
        "stderr": stderr.decode("utf-8", "replace")[-STDERR_TAIL_CHARACTERS:],
    }
