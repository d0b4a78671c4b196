"""llama-server, the program, as a child process that dies with this one."""

from __future__ import annotations

import collections
import contextlib
import http.client
import os
import re
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ..failure import Failure

VARIABLE = "PHISHIP_LLAMA_SERVER"
PROGRAM = "llama-server"
# The first build in which a crafted GGUF file does not overflow the heap (CVE-2026-27940). What we
# ask of a server is older: token ids in the stream (pull request 10853, December 2024), a limit for
# the cache of old prompts (16391, October 2025).
LOWEST_BUILD = 8146
HOST = "127.0.0.1"
ASK_TIMEOUT_S = 30
LOAD_TIMEOUT_S = 1800
ATTEMPTS = 3
STDERR_LINES = 30
# The pipe to the shell ends with this process, however it dies. As long as the shell has not waited
# for the server, no other process gets its number.
WATCH = '"$@" </dev/null & exec 2>/dev/null; cat >/dev/null; kill -9 $!; wait $!'


@dataclass(frozen=True)
class Program:
    """A llama-server that fits; `devices` are what it can compute on beside the CPU."""

    path: str
    build: int
    devices: tuple[str, ...]


def find_program() -> Program:
    """Return the program that PHISHIP_LLAMA_SERVER or PATH names; ImportError when none fits."""
    named = os.environ.get(VARIABLE)
    path = shutil.which(named or PROGRAM)
    if path is None:
        where = f"{VARIABLE}={named}: no such program" if named else f"{PROGRAM} is not in PATH"
        raise ImportError(where)
    build = read_build(_ask(path, "--version"))
    if build < LOWEST_BUILD:
        found = f"build {build}" if build else "of unknown build"
        raise ImportError(f"{path} is {found}; the lowest that fits is {LOWEST_BUILD}")
    return Program(path, build, _read_devices(_ask(path, "--list-devices")))


def read_build(text: str) -> int:
    """Return the build number in what --version prints; 0 when it says none.

    version: 8146 (1a2b3c4) once, version: 0.5.0 (build 11549, commit 1a2b3c4) later.
    """
    found = re.search(r"^version: (?:\S+ \(build )?(\d+)[ ,]", text, re.MULTILINE)
    return int(found.group(1)) if found else 0


class ChildServer:
    """A running llama-server with a key that nobody else knows; `options` become LLAMA_ARG_*."""

    def __init__(self, program: Program, options: Mapping[str, object]) -> None:
        self.version = f"{PROGRAM} b{program.build}"
        self.host, self.key = HOST, secrets.token_hex(16)
        for attempt in range(1, ATTEMPTS + 1):
            self.port = _find_port()
            self._start(program, options)
            try:
                self._wait_until_loaded(str(options["MODEL"]))
                break
            except Failure:
                # Another program may have taken the port in between.
                if "bind" not in self.explain() or attempt == ATTEMPTS:
                    raise

    def explain(self) -> str:
        """Return the last words of a server that has ended, and nothing of one that runs."""
        return "" if not self._is_over.is_set() else "\n".join(self._words)

    def close(self) -> None:
        """End the server."""
        if self._shell.stdin:
            with contextlib.suppress(OSError):
                self._shell.stdin.close()
        self._shell.wait()
        self._listener.join()

    def _start(self, program: Program, options: Mapping[str, object]) -> None:
        # In variables, for all users of a device see arguments. Unknown ones are ignored, so that
        # older builds do without what they have not; a user's own would change what we measure.
        environment = {name: text for name, text in os.environ.items() if name[:6] != "LLAMA_"}
        own = {"HOST": self.host, "PORT": self.port, **options}
        environment.update({f"LLAMA_ARG_{name}": str(value) for name, value in own.items()})
        environment["LLAMA_API_KEY"] = self.key
        self._words: collections.deque[str] = collections.deque(maxlen=STDERR_LINES)
        self._is_over = threading.Event()
        # A session of its own: an interrupt from the keyboard is ours to handle.
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", WATCH, "sh", program.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        """Keep the last lines of stderr, which ends with the server."""
        assert self._shell.stderr is not None
        with self._shell.stderr as lines:
            for line in lines:
                self._words.append(line.decode("utf-8", "replace").rstrip())
        self._is_over.set()

    def _wait_until_loaded(self, model: str) -> None:
        """Return when it answers; the key is not sent before, for it may be another's port."""
        deadline_s = time.monotonic() + LOAD_TIMEOUT_S
        while not _is_healthy(self.host, self.port):
            if self._is_over.is_set() or time.monotonic() > deadline_s:
                break
            self._is_over.wait(0.05)
        else:
            if not self._is_over.wait(0.05):
                return
        self.close()
        raise Failure("model", f"llama-server could not load {model}: {self.explain()}")


def _find_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _is_healthy(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=ASK_TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _ask(path: str, question: str) -> str:
    """Return all that the program prints; ImportError when it does not run."""
    try:
        done = subprocess.run(
            [path, question],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=ASK_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ImportError(f"{path} {question} fails: {error}") from None
    return done.stdout.decode("utf-8", "replace")


def _read_devices(text: str) -> tuple[str, ...]:
    """Return the names in what --list-devices prints: CUDA0: NVIDIA ... (... MiB, ... MiB free)."""
    return tuple(re.findall(r"^\s+(\w+): ", text, re.MULTILINE))
