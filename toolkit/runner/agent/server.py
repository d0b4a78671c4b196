"""Servers as children: a runner's own, or a script of the release that starts another program."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from ..failure import Failure
from . import child

if TYPE_CHECKING:
    from .serve import Agent

STOP_TIMEOUT_S = 20
START_TIMEOUT_S = 900  # of a script: a board may read gigabytes from a card first
POLL_S = 0.2
WORDS_S = 1.0
TAIL_LINES = 40
LOOPBACK = "127.0.0.1"
# Runs the script $0; a shell beside it ends it with our standard input, also when we are killed.
UNTIL_EOF = """
exec 3<&0
(cat <&3 >/dev/null; kill "$$") &
exec /bin/sh "$0" </dev/null 3<&-
"""


class Server:
    """A server under way, with its last words; it ends with `close`."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})}, start_new_session=True,
        )  # fmt: skip
        self.told: dict[str, Any] = {}
        self._words: list[str] = []
        self._watched = contextlib.ExitStack()
        self._watched.enter_context(child.watching(self.process))
        self._reading = child.drain(self.process.stderr, self._keep)

    @property
    def is_running(self) -> bool:
        """False once it has ended, for whatever reason."""
        return self.process.poll() is None

    def close(self, patience_s: float = STOP_TIMEOUT_S) -> str:
        """End its input, and it when that is not enough in time; returns its last words."""
        with contextlib.suppress(OSError):
            cast("IO[bytes]", self.process.stdin).close()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            child.kill_group(self.process.pid)
            self.process.wait()
        self._reading.join(WORDS_S)
        self._watched.close()
        return "\n".join(self._words)

    def explain_end(self) -> Failure:
        """Say how it ended, and with which last words."""
        code = self.process.wait()
        ended = child.name_signal(-code) if code < 0 else f"exit code {code}"
        return Failure("runner", f"the server ended: {ended}: {self.close()[-500:]}")

    def _keep(self, line: bytes) -> None:
        self._words.append(line.decode("utf-8", "replace").rstrip())
        del self._words[:-TAIL_LINES]


def open_server(command: list[str]) -> Server:
    """Start a runner's `serve` and wait until it listens; `told` is what it says of itself.

    It ends when its standard input does, whatever becomes of us. Failure when it ends before it
    listens, with its own reason, or does not listen in time.
    """
    server = Server([*command, "--json", "--until-eof"])
    try:
        with child.KillTimer(server.process.pid, START_TIMEOUT_S) as timer:
            server.told = _await_word(server)
    except BaseException:
        server.close(0)
        raise
    if not server.told:
        if timer.has_fired:
            raise Failure("runner", f"it does not listen within {START_TIMEOUT_S} s")
        raise server.explain_end()
    child.drain(server.process.stdout, lambda _: None)
    return server


def _await_word(server: Server) -> dict[str, Any]:
    """Return what the server says when it listens; nothing when it ends. Failure as it says."""
    for line in cast("IO[bytes]", server.process.stdout):
        with contextlib.suppress(ValueError):
            told = json.loads(line)
            if not isinstance(told, dict):
                continue
            if "error" in told:
                error = told["error"]
                raise Failure(error["kind"], error["message"], error["advice"])
            if "listening" in told:
                return told
    return {}


def start_server(agent: Agent, release: str, arguments: list[str]) -> dict[str, Any]:
    """Start a release's server, which lasts as long as this connection; returns what it told."""
    stop_server(agent)
    command = child.build_command(agent.find_artifact(release), ["serve", *arguments])
    agent.server = open_server(command)
    return agent.server.told


def start_script(
    agent: Agent, release: str, script: str, address_variable: str, ready_path: str,
    environment: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Run a release's script, which serves at the address in a variable; returns the port.

    It counts as started when GET `ready_path` is answered. Failure when it ends before that.
    """
    stop_server(agent)
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    path = agent.find_artifact(release) / script
    places = {name: str(Path(value).expanduser()) for name, value in environment.items()}
    address = {address_variable: f"{LOOPBACK}:{port}"}
    command = ["/bin/sh", "-c", UNTIL_EOF, str(path)]
    server = Server(command, {**places, **address})
    child.drain(server.process.stdout, lambda _: None)
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not is_answered(f"http://{LOOPBACK}:{port}{ready_path}"):
        if not server.is_running:
            raise server.explain_end()
        if time.monotonic() > deadline_s:
            server.close(0)
            raise Failure("runner", f"{script} does not answer within {START_TIMEOUT_S} s")
        time.sleep(POLL_S)
    agent.server = server
    return {"port": port}


def stop_server(agent: Agent) -> None:
    """End the server, if there is one, and keep its last words."""
    server, agent.server = agent.server, None
    if server is not None:
        # A script's program takes no notice of its standard input.
        words = server.close(STOP_TIMEOUT_S if server.told else 0)
        child.log_words(agent.layout, "server", words)


def is_answered(url: str) -> bool:
    """Whether a GET on this machine gets status 200."""
    import urllib.request  # which brings http and mail with it, and only services want

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:  # URLError is one
        return False
