"""The agent: one process for a whole push, which answers requests until its input ends.

in     {"call": NAME, ...arguments}, a line each; `receive` is followed by the bytes it announces
out    {"answer": {...}} or {"error": {...}} for each request in turn, and in between, every few
       seconds, {"beat": BYTES}: we live, and have worked through so many bytes of this request;
       {"progress": {...}} is what a release's runner says of long work
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

from .. import engines
from ..failure import Failure
from . import blobs, child, facts, install, journal, lock, releases, server, service
from .layout import Layout, open_layout

BEAT_S = 5.0
LOGS = (child.RUNNER_LOG, child.SERVICE_LOG)


class Agent:
    """What a push has here for as long as it lasts: the lock, and what it knows of parts."""

    def __init__(
        self, layout: Layout, stdin: io.BufferedIOBase, tell: Callable[[dict[str, Any]], None]
    ) -> None:
        self.layout = layout
        self.stdin = stdin
        self.lock: lock.Lock | None = None
        self.prefixes: blobs.Prefixes = {}
        self.server: server.Server | None = None
        self.tell = tell
        self.done_bytes = 0

    def count(self, size_bytes: int) -> None:
        """Take note of bytes worked through; the next beat tells."""
        self.done_bytes += size_bytes

    def find_artifact(self, release: str) -> Path:
        """Return a release's folder; `current` is the one in use."""
        layout = self.layout
        if release == "current":  # followed now: a switch may come before all files are open
            return layout.current.resolve()
        return releases.find_release(layout, release)


def serve(root: str) -> int:
    """Answer requests on stdin until it ends; 1 after a failure that ends the push."""
    stdin, stdout = cast("io.BufferedIOBase", sys.stdin.buffer), _Output(sys.stdout.buffer)
    try:
        agent = Agent(open_layout(root), stdin, stdout.send)
    except Failure as failure:
        stdout.send({"error": failure.to_json()})
        return 1
    with _beating(agent, stdout), contextlib.ExitStack() as ending:
        ending.callback(_end, agent)
        for line in iter(stdin.readline, b""):
            request = json.loads(line)
            name = request.pop("call")
            try:
                stdout.send({"answer": _answer(agent, name, request)})
            except Failure as failure:
                stdout.send({"error": failure.to_json()})
                if name == "receive":  # bytes that nobody wants any more are still to come
                    return 1
    return 0


def _end(agent: Agent) -> None:
    """Leave nothing behind that only this connection wanted, and what it has paused running."""
    try:
        server.stop_server(agent)
    finally:
        if agent.lock:
            service.resume_service(agent.layout)


def _answer(agent: Agent, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    agent.done_bytes = 0
    if name in _CHANGING and agent.lock is None:
        raise Failure("locked", f"{name} needs the lock, which this connection does not hold")
    try:
        return _CALLS[name](agent, **arguments)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise Failure("device", f"{name}: {where}{error.strerror or error}") from error


def _lock(agent: Agent, owner: str) -> dict[str, Any]:
    """Become the only push, and make whole what an earlier one left."""
    agent.lock = lock.take(agent.layout, owner)
    recovered = releases.recover(agent.layout)
    if recovered["returned"]:  # the service may still serve what was on trial
        service.start_service(agent.layout)
    service.resume_service(agent.layout)
    return recovered


def _facts(
    agent: Agent, engine: str = "", python: str = sys.executable, companions: Sequence[str] = ()
) -> dict[str, Any]:
    found = facts.read_facts(agent.layout)
    found["service_memory_bytes"] = service.read_service(agent.layout)["memory_bytes"]
    if engine:
        module = engines.find_engine(engine)
        imported = child.import_engine(module.MODULE, python, companions)
        if not imported["importable"]:
            imported.update(_find_program(module))
        found["engine"] = {"package": module.PACKAGE, **imported}
    return found


def _find_program(module: ModuleType) -> dict[str, Any]:
    """Return what a program of the device makes of an engine whose package cannot be imported."""
    if hasattr(module, "describe_program"):
        with contextlib.suppress(ImportError):
            version = module.describe_program()
            return {"importable": True, "version": version, "signal": None, "error": ""}
    return {}


def _run(
    agent: Agent, release: str, arguments: list[str], stdin: str, timeout_s: float
) -> dict[str, Any]:
    def take_line(line: bytes) -> None:
        told = child.read_progress(line)
        if told is not None:
            agent.tell({"progress": told})

    folder = agent.find_artifact(release)
    return child.run_release(agent.layout, folder, arguments, stdin.encode(), timeout_s, take_line)


def _unlock(agent: Agent, force: bool) -> dict[str, Any]:
    answer = lock.unlock(agent.layout, force=force)
    if force:
        service.resume_service(agent.layout)
    return answer


def _restart_service(agent: Agent) -> dict[str, Any]:
    server.stop_server(agent)  # memory may hold one model only
    return service.restart_service(agent.layout)


def _uninstall(agent: Agent) -> dict[str, Any]:
    service.remove_service(agent.layout)
    return releases.uninstall(agent.layout)


_CALLS: dict[str, Callable[..., dict[str, Any]]] = {
    "facts": _facts,
    "runtimes": lambda agent: install.find_runtimes(agent.layout),
    "status": lambda agent: releases.read_status(agent.layout),
    "history": lambda agent: {"events": journal.read(agent.layout)},
    "logs": lambda agent: {"text": child.read_log(agent.layout, *LOGS)},
    "manifest": lambda agent, release: releases.read_manifest(agent.find_artifact(release)),
    "survey": blobs.survey,
    "run": _run,
    "serve": server.start_server,
    "start_script": server.start_script,
    "serving": lambda agent: {"running": agent.server is not None and agent.server.is_running},
    "service": lambda agent: service.read_service(agent.layout),
    "unlock": _unlock,
    "lock": _lock,
    "receive": blobs.receive,
    "install": lambda agent, **request: install.install_runtime(agent.layout, **request),
    "stage": lambda agent, **request: releases.stage_release(agent.layout, **request),
    "discard": lambda agent, release: releases.discard_release(agent.layout, release),
    "switch": lambda agent, release: releases.switch_release(agent.layout, release),
    "return": lambda agent: releases.return_to_good(agent.layout),
    "confirm": lambda agent, release: releases.confirm_release(agent.layout, release),
    "prune": lambda agent: releases.prune(agent.layout),
    "install_service": lambda agent, **request: service.install_service(agent.layout, **request),
    "remove_service": lambda agent: service.remove_service(agent.layout),
    "pause_service": lambda agent: service.pause_service(agent.layout),
    "restart_service": _restart_service,
    "uninstall": _uninstall,
}
_CHANGING = {
    *("receive", "install", "stage", "discard", "switch", "return", "confirm", "prune"),
    *("uninstall", "install_service", "remove_service", "pause_service", "restart_service"),
}


class _Output:
    """Whole lines, also from two threads."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._turn = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        with self._turn:
            self._stream.write(json.dumps(message).encode() + b"\n")
            self._stream.flush()


@contextlib.contextmanager
def _beating(agent: Agent, stdout: _Output) -> Iterator[None]:
    """Give signs of life; when nobody is there to see them, end, and let go of the lock."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            try:
                stdout.send({"beat": agent.done_bytes})
                if agent.lock:
                    agent.lock.beat()
            except OSError:
                child.kill_running()
                if agent.lock:
                    service.resume_service(agent.layout)
                os._exit(1)

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
