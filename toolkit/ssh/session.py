"""The agent on a device, reached by one command that lasts for the whole push."""

import base64
import contextlib
import json
import os
import queue
import shlex
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from toolkit.device import Device
from toolkit.errors import (
    ArtifactError,
    PhishipError,
    PreflightError,
    RunnerError,
    UnreachableError,
)
from toolkit.progress import Advance, ignore
from toolkit.ssh.bundle import Runner, pack_runner
from toolkit.ssh.carrier import Carrier, Ending, Stream, explain_loss, lost, open_stream
from toolkit.ssh.login import fetch_host_key

# A board that swaps may take long to start Python; the agent's beats come every 5 s afterwards.
START_TIMEOUT_S = 120
SILENCE_TIMEOUT_S = 60
TakeProgress = Callable[[dict[str, Any]], None]

LINE_LIMIT_BYTES = 8 << 20
OLDEST_PYTHON = (3, 9)
SHELL_NOT_FOUND = 127
ERRORS: dict[str, type[PhishipError]] = {
    "artifact": ArtifactError,
    "cut": UnreachableError,
    "device": PreflightError,
    "disk_full": PreflightError,
    "locked": PreflightError,
    "root": PreflightError,
    "runtime": PreflightError,
}
# Runs under any Python, even one that is too old, to say so. Arguments: root, sha256, size of the
# runner. It says whether the runner is here, reads it from standard input when not, writes it as
# the agent writes every blob, and becomes the agent.
BOOTSTRAP = """
import hashlib, json, os, sys
root, name, size = sys.argv[1:]
base = os.path.join(os.path.abspath(os.path.expanduser(root)), "v1")
folder = os.path.join(base, "blobs", "sha256")
incoming = os.path.join(base, "incoming")
path = os.path.join(folder, name)
part = os.path.join(incoming, "%s.%d.part" % (name, os.getpid()))
def say(**fields):
    sys.stdout.write(json.dumps(fields) + "\\n")
    sys.stdout.flush()
def check(content):
    return hashlib.sha256(content).hexdigest() == name
def sync(place):
    number = os.open(place, os.O_RDONLY)
    os.fsync(number)
    os.close(number)
def put(content):
    for place in (folder, incoming):
        os.makedirs(place, mode=0o700, exist_ok=True)
    with open(part, "wb") as stream:
        stream.write(content)
    os.chmod(part, 0o444)
    sync(part)
    os.replace(part, path)
    sync(folder)
version = list(sys.version_info[:3])
if version < [3, 9]:
    say(python=version)
    sys.exit()
try:
    have = os.path.isfile(path) and check(open(path, "rb").read())
    say(python=version, have=have)
    if not have:
        content = sys.stdin.buffer.read(int(size))
        if not check(content):
            say(damaged=True)
            sys.exit()
        put(content)
        say(have=True)
except OSError as error:
    say(error=str(error))
    sys.exit()
sys.argv = [path, "agent", "serve", "--root", root]
import runpy
runpy.run_path(path, run_name="__main__")
"""


class Session:
    """Requests to the agent, one at a time; a thread reads its answers and signs of life."""

    def __init__(self, device: Device, stream: Stream) -> None:
        self.device = device
        self._stream = stream
        self._messages: queue.Queue[dict[str, Any] | Exception | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def call(
        self,
        name: str,
        payload: Iterable[bytes | memoryview] = (),
        *,
        advance: Advance = ignore,
        take_progress: TakeProgress | None = None,
        **arguments: object,
    ) -> dict[str, Any]:
        """Call the agent; its failures come as the error class they belong to.

        `payload` follows the request. `advance` is told of bytes that the agent works through,
        `take_progress` of what a release's runner says of its work.
        UnreachableError when the connection breaks or the device falls silent.
        """
        request = json.dumps({"call": name, **arguments}).encode() + b"\n"
        with explain_loss(self.device.name):
            takes_more = self._stream.send(request)
            for piece in payload:
                # An answer before the end of the payload can only be a failure.
                if not takes_more or (not self._messages.empty() and self._is_answered()):
                    break
                takes_more = self._stream.send(piece)
            answer = self._wait(name, advance, take_progress)
        if "error" in answer:
            error = answer["error"]
            kind = ERRORS.get(error["kind"], RunnerError)
            raise kind(f"{self.device.name}: {error['message']}", advice=error["advice"])
        found: dict[str, Any] = answer["answer"]
        return found

    def lock(self) -> dict[str, Any]:
        """Become the only push on the device; the lock goes with the connection."""
        return self.call("lock", owner=f"process {os.getpid()} on {socket.gethostname()}")

    def start(self, runner: Runner) -> None:
        """Bring the runner there unless it is; the agent answers from then on."""
        with explain_loss(self.device.name):
            found = self._expect("python")
            version = ".".join(str(number) for number in found["python"])
            if tuple(found["python"]) < OLDEST_PYTHON:
                raise PreflightError(
                    f"{self.device.name}: {self.device.python} is Python {version}; 3.9 or newer "
                    "is needed",
                    advice="install a newer Python there, and name it with `python:` in "
                    "devices.yaml",
                )
            if not found.get("have"):
                self._stream.send(runner.content)
                self._expect("have")

    def _expect(self, key: str) -> dict[str, Any]:
        """Return the next message that has `key`; whatever a login shell prints is passed over."""
        while True:
            message = self._next(START_TIMEOUT_S)
            if message is None:
                raise self._explain_start(self._stream.finish())
            if "error" in message:
                raise PreflightError(
                    f"{self.device.name}: the runner cannot be written: {message['error']}",
                    advice="choose another folder: `root:` in devices.yaml",
                )
            if "damaged" in message:
                raise UnreachableError(
                    f"{self.device.name}: the runner arrived damaged", advice="try again"
                )
            if key in message:
                return message

    def _wait(
        self, name: str, advance: Advance, take_progress: TakeProgress | None
    ) -> dict[str, Any]:
        """Return the answer; beats only prolong the patience."""
        done_bytes = 0
        while True:
            message = self._next(SILENCE_TIMEOUT_S)
            if message is None:
                raise self._explain_end(name, self._stream.finish())
            if "beat" in message:
                advance(max(0, message["beat"] - done_bytes))
                done_bytes = max(done_bytes, message["beat"])
            elif "progress" in message and take_progress:
                take_progress(message["progress"])
            elif "answer" in message or "error" in message:
                return message

    def _is_answered(self) -> bool:
        """Drop signs of life; True when something else is waiting."""
        with self._messages.mutex:
            waiting = self._messages.queue
            while waiting and isinstance(waiting[0], dict) and "beat" in waiting[0]:
                waiting.popleft()
            return bool(waiting)

    def _next(self, timeout_s: float) -> dict[str, Any] | None:
        try:
            message = self._messages.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"the device was silent for {timeout_s:.0f} s") from None
        if message is None or isinstance(message, Exception):
            self._messages.put(message)  # the end stays the end, for every later call
        if isinstance(message, Exception):
            raise message
        return message

    def _read(self) -> None:
        """Put every line that is a JSON object into the queue, then None or what went wrong."""
        rest = b""
        try:
            while piece := self._stream.receive():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    self._put(line)
                if len(rest) > LINE_LIMIT_BYTES:
                    raise EOFError(f"the device printed more than {LINE_LIMIT_BYTES} bytes a line")
            self._messages.put(None)
        except Exception as error:  # for the thread that waits
            self._messages.put(error)

    def _put(self, line: bytes) -> None:
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                self._messages.put(message)

    def _explain_end(self, name: str, ending: Ending) -> PhishipError:
        if ending.is_lost:
            return lost(self.device.name, "the device closed it")
        return RunnerError(
            f"{self.device.name}: the agent failed at {name}: {ending.describe()}",
            advice="run the same command again; if it stays, report it with this message",
        )

    def _explain_start(self, ending: Ending) -> PhishipError:
        name, python = self.device.name, self.device.python
        if ending.is_lost:
            lines = ending.stderr.strip().splitlines()
            return UnreachableError(
                f"{name}: {lines[-1] if lines else 'the device closed the connection'}",
                advice="try `ssh` by hand; with --carrier paramiko phiship logs in by itself",
            )
        if ending.code == SHELL_NOT_FOUND:
            return PreflightError(
                f"{name}: there is no {python}; Python 3.9 or newer is needed",
                advice="install Python there, or name it with `python:` in devices.yaml",
            )
        return PreflightError(
            f"{name}: {python} does not start: {ending.describe()}",
            advice="name a working Python with `python:` in devices.yaml",
        )


@contextlib.contextmanager
def open_session(device: Device, carrier: Carrier = "paramiko") -> Iterator[Session]:
    """Log in, start the agent, and end it with the block.

    Raises UnreachableError, HostKeyError, or PreflightError when the agent cannot run there.
    """
    runner = pack_runner()
    with open_stream(device, build_command(device, runner), carrier) as stream:
        session = Session(device, stream)
        try:
            session.start(runner)
        except UnreachableError:
            if carrier == "openssh":
                fetch_host_key(device)  # raises, with better words, unless the login was refused
            raise
        yield session
        # Its end is awaited, so that the lock is free when the block is left.
        stream.finish()


def build_command(device: Device, runner: Runner) -> str:
    """Return the shell command that starts the agent, and asks for the runner when it is new."""
    # Base64 passes through every login shell unchanged, csh and fish included.
    program = base64.b64encode(BOOTSTRAP.encode()).decode()
    words = [*shlex.split(device.python), "-B", "-c"]
    words += [f"import base64;exec(base64.b64decode('{program}'))"]
    return shlex.join([*words, device.root, runner.sha256, str(len(runner.content))])
