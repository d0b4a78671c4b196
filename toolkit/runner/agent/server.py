"""A runner's server as a child: it listens, answers, and ends when its standard input does."""

from __future__ import annotations

import contextlib
import json
import subprocess
from typing import IO, TYPE_CHECKING, Any, cast

from ..failure import Failure
from . import child

if TYPE_CHECKING:
    from .serve import Agent

STOP_TIMEOUT_S = 20
TAIL_LINES = 40


class Server:
    """A server under way; `told` is what it says of itself: `listening` is its address.

    Failure when it ends before it listens, with its own reason.
    """

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            [*command, "--json", "--until-eof"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._words: list[str] = []
        self._watched = contextlib.ExitStack()
        self._watched.enter_context(child.watching(self._process))
        child.drain(self._process.stderr, self._keep)
        self.told = self._wait()

    @property
    def is_running(self) -> bool:
        """False once it has ended, for whatever reason."""
        return self._process.poll() is None

    def close(self) -> str:
        """Let it finish what it is answering, then end it; returns its last words."""
        with contextlib.suppress(OSError):
            cast("IO[bytes]", self._process.stdin).close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill_group(self._process.pid)
            self._process.wait()
        self._watched.close()
        return "\n".join(self._words)

    def _wait(self) -> dict[str, Any]:
        for line in cast("IO[bytes]", self._process.stdout):
            with contextlib.suppress(ValueError):
                told: dict[str, Any] = json.loads(line)
                if "error" in told:
                    self.close()
                    error = told["error"]
                    raise Failure(error["kind"], error["message"], error["advice"])
                if "listening" in told:
                    child.drain(self._process.stdout, lambda _: None)
                    return told
        code = self._process.wait()
        ended = child.name_signal(-code) if code < 0 else f"exit code {code}"
        raise Failure("runner", f"the server ended: {ended}: {self.close()[-500:]}")

    def _keep(self, line: bytes) -> None:
        self._words.append(line.decode("utf-8", "replace").rstrip())
        del self._words[:-TAIL_LINES]


def start_server(agent: Agent, release: str, arguments: list[str]) -> dict[str, Any]:
    """Start a release's server, which lasts as long as this connection; returns what it told."""
    stop_server(agent)
    command = child.build_command(agent.find_artifact(release), ["serve", *arguments])
    agent.server = Server(command)
    return agent.server.told


def stop_server(agent: Agent) -> None:
    """End the server, if there is one, and keep its last words."""
    server, agent.server = agent.server, None
    if server is not None:
        child.log_words(agent.layout, "server", server.close())
