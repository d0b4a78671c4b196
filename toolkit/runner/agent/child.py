"""Work that may crash runs in a child process, whose end is reported by name."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from ..failure import Failure
from .layout import Layout
from .releases import RUNNER, RUNTIME

STDERR_TAIL_CHARACTERS = 2000
IMPORT_TIMEOUT_S = 120
LOG_BYTES = 1 << 20
LOG_TAIL_CHARACTERS = 20_000
RUNNER_LOG = "runner.log"
SERVICE_LOG = "service.log"

TakeLine = Callable[[bytes], None]

_running: set[int] = set()


def run_child(
    command: list[str], stdin: bytes, timeout_s: float, take_line: TakeLine | None = None
) -> dict[str, Any]:
    """Run a command; returns code, signal (name or None), stdout, and the end of stderr.

    `take_line` gets each line of stdout as it comes.
    """
    # A group of its own, so that nothing it starts outlives it.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    lines: list[bytes] = []
    errors: list[bytes] = []
    with watching(process), KillTimer(process.pid, timeout_s) as timer:
        feeding = threading.Thread(target=_feed, args=(process.stdin, stdin))
        feeding.start()
        reading = drain(process.stderr, errors.append)
        for line in cast("IO[bytes]", process.stdout):
            lines.append(line)
            if take_line:
                take_line(line)
        code = process.wait()
        feeding.join()
        reading.join()
    if timer.has_fired:
        return _describe(None, b"", b"".join(errors), timeout_s)
    return _describe(code, b"".join(lines), b"".join(errors), None)


@contextlib.contextmanager
def watching(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Have a child killed by `kill_running` as long as the block lasts, or when it fails."""
    _running.add(process.pid)
    try:
        yield
    except BaseException:  # Ctrl-C too: the child is in a group of its own
        kill_group(process.pid)
        process.wait()
        raise
    finally:
        _running.discard(process.pid)


def drain(stream: IO[bytes] | None, take_line: TakeLine) -> threading.Thread:
    """Read a child's output to its end, in a thread, so that the child never has to wait."""

    def read() -> None:
        with cast("IO[bytes]", stream) as lines:
            for line in lines:
                take_line(line)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def kill_running() -> None:
    """Kill every child with all it has started."""
    for pid in list(_running):
        kill_group(pid)


def name_signal(number: int) -> str:
    """Return a signal's name: 4 -> 'SIGILL'."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def run_release(
    layout: Layout, artifact: Path, arguments: list[str], stdin: bytes, timeout_s: float,
    take_line: TakeLine | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run a release's own runner; `answer` is the JSON of its last line, None without one."""
    command = build_command(artifact, arguments)
    done = add_answer(run_child(command, stdin, timeout_s, take_line))
    error = (done["answer"] or {}).get("error", {}).get("message", "")
    log_words(layout, artifact.resolve().name, f"{done['stderr']}{error}")
    return done


def add_answer(done: dict[str, Any]) -> dict[str, Any]:
    """Return how a runner ended, with the JSON of its last line in place of its output."""
    try:
        answer = json.loads(done.pop("stdout").strip().rpartition("\n")[2])
    except ValueError:
        answer = None
    return {**done, "answer": answer}


def read_progress(line: bytes) -> Any | None:
    """Return what a runner says of its work in a line of its output; None when it is another."""
    with contextlib.suppress(ValueError):
        told = json.loads(line)
        if isinstance(told, dict):
            return told.get("progress")
    return None


def build_command(artifact: Path, arguments: list[str]) -> list[str]:
    """Return the command that runs a release's own runner; Failure when it is not there."""
    if not (artifact / RUNNER).is_file():
        raise Failure("request", f"{artifact}: no release is deployed there")
    first, *rest = arguments
    runner = [*find_python(artifact), "-B", str(artifact / RUNNER)]
    return [*runner, first, "--artifact", str(artifact), *rest]


def find_python(artifact: Path) -> list[str]:
    """Return the Python of a release: of its runtime, and nothing else, or the one that runs us."""
    own = artifact / RUNTIME / "bin" / "python"
    return [str(own), "-I"] if (artifact / RUNTIME).is_symlink() else [sys.executable]


# Lines of JSON, all but the last before anything can crash; engines may print in between.
IMPORT_PROGRAM = """
import importlib, importlib.metadata, importlib.util, json, re, sys
name, *beside = sys.argv[1:]
print(json.dumps({"is_installed": importlib.util.find_spec(name) is not None}))
for wanted in beside:
    package, _, oldest = wanted.partition(">=")
    for found in importlib.metadata.distributions(name=package):
        numbers = [[int(n) for n in re.findall("[0-9]+", v)[:3]] for v in (found.version, oldest)]
        if numbers[0] >= numbers[1]:
            print(json.dumps({"companion": wanted}))
        break
sys.stdout.flush()
version = getattr(importlib.import_module(name), "__version__", "")
try:
    version = str(version) or importlib.metadata.version(name)
except importlib.metadata.PackageNotFoundError:
    pass
print(json.dumps({"version": version}))
"""


def import_engine(
    module: str, python: str = sys.executable, companions: Sequence[str] = ()
) -> dict[str, Any]:
    """Import an engine's module; some wheels die there with an illegal instruction.

    `is_installed` tells one that is there and fails from one that is missing; `companions` are
    those of the packages asked for, by name or as name>=version, that this Python has.
    """
    command = [python, "-B", "-c", IMPORT_PROGRAM, module, *companions]
    done = run_child(command, b"", IMPORT_TIMEOUT_S)
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
        "companions": re.findall(r'^{"companion": "(.*)"}$', done["stdout"], re.MULTILINE),
    }


def read_log(layout: Layout, *names: str) -> str:
    """Return the end of what runners said, in each of these files."""
    paths = [layout.logs / name for name in names]
    return "".join(
        path.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL_CHARACTERS:]
        for path in paths
        if path.exists()
    )


def trim_log(layout: Layout, name: str) -> None:
    """Move a log beyond LOG_BYTES aside; whoever appends to it goes on in the same file."""
    path = layout.logs / name
    if path.exists() and path.stat().st_size > LOG_BYTES:
        shutil.copyfile(str(path), str(path.with_name(f"{name}.1")))
        os.truncate(str(path), 0)


def log_words(layout: Layout, release: str, text: str) -> None:
    """Keep a runner's last words; the file before the last LOG_BYTES is kept too."""
    if not text.strip():
        return
    path = layout.logs / RUNNER_LOG
    if path.exists() and path.stat().st_size > LOG_BYTES:
        path.replace(path.with_name("runner.log.1"))
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"--- {now} {release}\n{text.rstrip()}\n")


class KillTimer(threading.Timer):
    """Kills a group of processes when its time is up before the block's end."""

    def __init__(self, pid: int, timeout_s: float) -> None:
        super().__init__(timeout_s, self._fire)
        self._pid = pid
        self.has_fired = False
        self.daemon = True

    def __enter__(self) -> KillTimer:
        """Let the time run."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self.cancel()

    def _fire(self) -> None:
        self.has_fired = True
        kill_group(self._pid)


def _feed(stream: IO[bytes] | None, content: bytes) -> None:
    with contextlib.suppress(OSError), cast("IO[bytes]", stream) as sink:
        sink.write(content)


def kill_group(pid: int) -> None:
    """Kill a child with all it has started; nothing happens when it has ended."""
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
