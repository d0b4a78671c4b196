"""The runner's agent on a device: put there once, then called with one command each."""

import base64
import contextlib
import json
import os
import secrets
import shlex
import socket
from collections.abc import Iterable, Iterator
from typing import Any

from toolkit.errors import (
    ArtifactError,
    PhishipError,
    PreflightError,
    RunnerError,
    UnreachableError,
)
from toolkit.ssh.bundle import Runner, pack_runner
from toolkit.ssh.connection import Completed, Connection

START_TIMEOUT_S = 120
CALL_TIMEOUT_S = 300
OLDEST_PYTHON = (3, 9)
SHELL_NOT_FOUND = 127
# Runs under any Python, even one that is too old, to say so. Arguments: root, sha256, look | put.
# `put` reads the runner from standard input and writes it as the agent writes every blob.
BOOTSTRAP = """
import hashlib, json, os, sys
root, name, mode = sys.argv[1:]
base = os.path.join(os.path.abspath(os.path.expanduser(root)), "v1")
folder = os.path.join(base, "blobs", "sha256")
incoming = os.path.join(base, "incoming")
path = os.path.join(folder, name)
part = os.path.join(incoming, "%s.%d.part" % (name, os.getpid()))
answer = {"python": list(sys.version_info[:3]), "path": path}
def check(content):
    return hashlib.sha256(content).hexdigest() == name
def sync(place):
    number = os.open(place, os.O_RDONLY)
    os.fsync(number)
    os.close(number)
try:
    if mode == "put":
        content = sys.stdin.buffer.read()
        if check(content):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            os.makedirs(incoming, mode=0o700, exist_ok=True)
            with open(part, "wb") as stream:
                stream.write(content)
            os.chmod(part, 0o444)
            sync(part)
            os.replace(part, path)
            sync(folder)
    answer["have"] = os.path.isfile(path) and check(open(path, "rb").read())
except (IOError, OSError) as error:
    answer["error"] = str(error)
print(json.dumps(answer))
"""
ERRORS: dict[str, type[PhishipError]] = {
    "artifact": ArtifactError,
    "corrupt": ArtifactError,
    "cut": UnreachableError,
    "disk_full": PreflightError,
    "locked": PreflightError,
    "root": PreflightError,
}


class Agent:
    """The agent on one device; every call is one command on the connection."""

    def __init__(self, connection: Connection, path: str) -> None:
        self._connection = connection
        self._path = path
        self._token = ""
        self.device = connection.device

    def build_command(self, name: str, **options: object) -> str:
        """Return the shell command of a call: options become --name value."""
        words = [*_python(self.device.python), self._path, "agent", name]
        words += ["--root", self.device.root]
        for key, value in options.items():
            words += [f"--{key.replace('_', '-')}", str(value)]
        return shlex.join(words)

    def call(
        self,
        name: str,
        stdin: bytes | Iterable[bytes] = b"",
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        **options: object,
    ) -> dict[str, Any]:
        """Call the agent; its failures come as the error class they belong to."""
        command = self.build_command(name, **options)
        done = self._connection.run(command, stdin, timeout_s=timeout_s)
        return _read_answer(self.device.name, name, done)

    def change(
        self,
        name: str,
        stdin: bytes | Iterable[bytes] = b"",
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        **options: object,
    ) -> dict[str, Any]:
        """Call a command that changes the device, inside `hold_lock`."""
        return self.call(name, stdin, timeout_s=timeout_s, token=self._token, **options)

    @contextlib.contextmanager
    def hold_lock(self) -> Iterator[None]:
        """Be the only push on the device; the lock goes with the connection."""
        token = secrets.token_hex(8)
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        command = self.build_command("hold", owner=owner, token=token)
        with self._connection.hold(command) as line:
            answer = _read_answer(self.device.name, "hold", Completed(line, b"", 0, None))
            self._token = answer["held"]
            yield


def start_agent(connection: Connection) -> Agent:
    """Put the runner on the device unless it is there; PreflightError when it cannot run."""
    runner = pack_runner()
    found = _bootstrap(connection, runner, "look", b"")
    if not found["have"]:
        found = _bootstrap(connection, runner, "put", runner.content)
    if not found["have"]:
        raise UnreachableError(
            f"{connection.device.name}: the runner arrived damaged", advice="try again"
        )
    return Agent(connection, found["path"])


def build_bootstrap(python: str, root: str, sha256: str, mode: str) -> str:
    """Return the shell command that looks for the runner (`look`) or writes it (`put`)."""
    # Base64 passes through every login shell unchanged, csh and fish included.
    program = base64.b64encode(BOOTSTRAP.encode()).decode()
    words = [*_python(python), "-c", f"import base64;exec(base64.b64decode('{program}'))"]
    return shlex.join([*words, root, sha256, mode])


def _python(python: str) -> list[str]:
    return [*shlex.split(python), "-B"]


def _bootstrap(connection: Connection, runner: Runner, mode: str, stdin: bytes) -> dict[str, Any]:
    device = connection.device
    command = build_bootstrap(device.python, device.root, runner.sha256, mode)
    done = connection.run(command, stdin, timeout_s=START_TIMEOUT_S)
    try:
        found: dict[str, Any] = json.loads(done.stdout.decode().strip().rpartition("\n")[2])
    except ValueError:
        raise _no_python(device.name, device.python, done) from None
    if tuple(found["python"]) < OLDEST_PYTHON:
        version = ".".join(str(number) for number in found["python"])
        raise PreflightError(
            f"{device.name}: {device.python} is Python {version}; 3.9 or newer is needed",
            advice="install a newer Python there, and name it with `python:` in devices.yaml",
        )
    if "error" in found:
        raise PreflightError(
            f"{device.name}: the runner cannot be written: {found['error']}",
            advice="choose another folder: `root:` in devices.yaml",
        )
    return found


def _no_python(name: str, python: str, done: Completed) -> PreflightError:
    if done.code == SHELL_NOT_FOUND:
        return PreflightError(
            f"{name}: there is no {python}; Python 3.9 or newer is needed",
            advice="install Python there, or name it with `python:` in devices.yaml",
        )
    return PreflightError(
        f"{name}: {python} does not start: {_describe_end(done)}",
        advice="name a working Python with `python:` in devices.yaml",
    )


def _read_answer(device: str, name: str, done: Completed) -> dict[str, Any]:
    """Decode the last line of the agent's output; raise what it reports."""
    try:
        answer: dict[str, Any] = json.loads(done.stdout.decode().strip().rpartition("\n")[2])
    except ValueError:
        raise RunnerError(
            f"{device}: the agent failed at {name}: {_describe_end(done)}",
            advice="run the same command again; if it stays, report it with this message",
        ) from None
    if "error" in answer:
        error = answer["error"]
        kind = ERRORS.get(error["kind"], RunnerError)
        raise kind(f"{device}: {error['message']}", advice=error["advice"])
    return answer


def _describe_end(done: Completed) -> str:
    ended = f"killed by {done.signal}" if done.signal else f"exit code {done.code}"
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return f"{ended}: {lines[-1]}" if lines else ended
