"""Work that may crash runs in a child process, whose end is reported by name."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..failure import Failure
from .releases import RUNNER

STDERR_TAIL_CHARACTERS = 2000
IMPORT_TIMEOUT_S = 120


def run_child(command: list[str], stdin: bytes, timeout_s: float) -> dict[str, Any]:
    """Run a command; returns code, signal (name or None), stdout, and the end of stderr."""
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        tail = _tail(error.stderr or b"")
        return {"code": None, "signal": None, "timeout_s": timeout_s, "stdout": "", "stderr": tail}
    return {
        "code": done.returncode,
        "signal": name_signal(-done.returncode) if done.returncode < 0 else None,
        "timeout_s": None,
        "stdout": done.stdout.decode("utf-8", "replace"),
        "stderr": _tail(done.stderr),
    }


def name_signal(number: int) -> str:
    """Return a signal's name: 4 -> 'SIGILL'."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def ask_release(artifact: Path, prompt: bytes, max_tokens: int, timeout_s: float) -> dict[str, Any]:
    """Let a release's own runner answer; `answer` is its JSON, None when it printed none."""
    if not (artifact / RUNNER).is_file():
        raise Failure("request", f"{artifact}: no release is deployed there")
    command = [sys.executable, "-B", str(artifact / RUNNER), "generate", "--json"]
    command += ["--artifact", str(artifact), "--max-tokens", str(max_tokens)]
    done = run_child(command, prompt, timeout_s)
    try:
        answer = json.loads(done.pop("stdout").strip().rpartition("\n")[2])
    except ValueError:
        answer = None
    return {**done, "answer": answer}


def import_engine(module: str) -> dict[str, Any]:
    """Import an engine's module; some wheels die there with an illegal instruction."""
    program = f"import {module} as m; print(getattr(m, '__version__', ''))"
    done = run_child([sys.executable, "-B", "-c", program], b"", IMPORT_TIMEOUT_S)
    lines = done["stderr"].strip().splitlines()
    return {
        "module": module,
        "importable": done["code"] == 0,
        "version": done["stdout"].strip(),
        "signal": done["signal"],
        "error": "" if done["code"] == 0 else (lines[-1] if lines else "no message"),
    }


def _tail(text: bytes) -> str:
    return text.decode("utf-8", "replace")[-STDERR_TAIL_CHARACTERS:]
