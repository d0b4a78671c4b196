"""The release in use as a service of this user, written on request and never with sudo.

The service runs `agent start`, which ends a trial that
has failed before it serves; so a release that crashes its server is left by the next start.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from ..failure import Failure
from . import journal
from .child import read_log
from .durable import sync_folder, write_json
from .layout import Layout
from .managers import find_manager
from .releases import read_link
from .server import LOOPBACK, is_answered

READY_TIMEOUT_S = 600  # a board may read gigabytes from a card first
POLL_S = 0.5


def install_service(layout: Layout, port: int, host: str, token: str | None) -> dict[str, Any]:
    """Write the service, have it start now and at every boot; returns what `read_service` does.

    Failure when this system has no services for users. A token is kept in a file of mode 0600.
    """
    manager = find_manager(layout)
    arguments = ["--host", host, "--port", str(port)]
    if token is not None:
        _write_token(layout.base / "token", token)
        arguments += ["--token-file", str(layout.base / "token")]
    write_json(layout.service, {"port": port, "host": host, "arguments": arguments})
    manager.write(arguments)
    try:
        found = restart_service(layout)
    except Failure:
        remove_service(layout)
        raise
    journal.log(layout, "service", installed=manager.name, port=port)
    return found


def remove_service(layout: Layout) -> dict[str, Any]:
    """Stop the service and remove what was written for it; nothing happens when there is none."""
    if not layout.service.exists():
        return {"removed": None}
    manager = find_manager(layout)
    manager.remove()
    for path in (layout.base / "token", layout.service):
        path.unlink(missing_ok=True)
    sync_folder(layout.base)
    journal.log(layout, "service", removed=manager.name)
    return {"removed": manager.name}


def read_service(layout: Layout) -> dict[str, Any]:
    """Return whether the service is installed and active, its name, port and memory."""
    if not layout.service.exists():
        return {"installed": False, "active": False, "memory_bytes": 0}
    manager, stored = find_manager(layout), _read_stored(layout)
    pid = manager.find_pid()
    return {
        "installed": True,
        "active": pid is not None,
        "name": manager.name,
        "port": stored["port"],
        "host": stored["host"],
        "has_token": "--token-file" in stored["arguments"],
        "memory_bytes": _read_memory_bytes(pid),
    }


def stop_service(layout: Layout) -> dict[str, Any]:
    """Stop the service until it is started again, the push ends, or the device boots."""
    write_json(layout.service, {**_read_stored(layout), "is_paused": True})
    find_manager(layout).stop()
    return read_service(layout)


def resume_service(layout: Layout) -> None:
    """Start a service that a push has paused; whatever goes wrong is in its log."""
    if layout.service.exists() and _read_stored(layout).get("is_paused"):
        with contextlib.suppress(Failure):
            restart_service(layout)


def restart_service(layout: Layout) -> dict[str, Any]:
    """Start the service anew and wait until it answers; Failure with its last words otherwise."""
    manager, stored = find_manager(layout), _read_stored(layout)
    release = read_link(layout.current)
    manager.restart()
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while not _is_ready(stored):
        if manager.has_failed() or time.monotonic() > deadline_s:
            words = read_log(layout, "service.log").strip().splitlines()[-3:]
            raise Failure(
                "service",
                f"the service {manager.name} does not answer: {' | '.join(words) or 'no words'}",
                "look into it: phiship logs DEVICE",
            )
        time.sleep(POLL_S)
    if read_link(layout.current) != release:
        raise Failure("service", f"{release} does not serve; the service is back on the good one")
    if stored.get("is_paused"):
        write_json(layout.service, {**stored, "is_paused": False})
    return read_service(layout)


def _is_ready(stored: dict[str, Any]) -> bool:
    """Whether the server says that it is well."""
    host = LOOPBACK if stored["host"] in ("0.0.0.0", "::", "") else stored["host"]
    host = f"[{host}]" if ":" in host else host
    return is_answered(f"http://{host}:{stored['port']}/health")


def _write_token(path: Path, token: str) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(token)


def _read_stored(layout: Layout) -> dict[str, Any]:
    if not layout.service.exists():
        raise Failure("service", "no service is installed", "phiship serve DEVICE --install")
    stored: dict[str, Any] = json.loads(layout.service.read_text(encoding="utf-8"))
    return stored


def _read_memory_bytes(pid: int | None) -> int:
    """Return a process's resident memory; 0 where that is not known."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
