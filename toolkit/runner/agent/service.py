"""The release in use as a service of this user, written on request and never with sudo.

The service runs `agent start`: a release on trial may start once, so one that crashes its server is
left by the next start.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..failure import Failure
from ..memory import read_own_memory_bytes
from . import journal
from .child import SERVICE_LOG, read_log
from .durable import sync_folder, write_json
from .layout import Layout
from .managers import choose_manager, find_manager
from .releases import read_link
from .server import LOOPBACK, is_answered

READY_TIMEOUT_S = 600  # a board may read gigabytes from a card first
POLL_S = 0.5


def install_service(
    layout: Layout, port: int, host: str, token: str | None, settings: Sequence[str]
) -> dict[str, Any]:
    """Write the service, have it start now and at every boot; returns what `read_service` does.

    Failure when this system has no services for users, or it does not answer; the service there
    was, if any, is then back. A token is kept in a file of mode 0600.
    """
    manager = find_manager(layout)
    before = _read_stored(layout) if layout.service.exists() else None
    old_token = _find_token(layout).read_text() if _find_token(layout).exists() else None
    arguments = ["--host", host, "--port", str(port), *settings]
    try:
        _write(layout, {"port": port, "host": host, "arguments": arguments}, token)
        found = restart_service(layout)
    except (Failure, OSError):
        manager.stop()
        if before is None:
            remove_service(layout)
        else:
            _write(layout, before, old_token)
            start_service(layout)
        raise
    journal.log(layout, "service", installed=manager.name, port=port)
    return found


def remove_service(layout: Layout) -> dict[str, Any]:
    """Stop the service and remove what was written for it; nothing happens when there is none."""
    if not layout.service.exists():
        return {"removed": None}
    manager = choose_manager(layout)
    manager.remove()
    for path in (_find_token(layout), layout.service):
        path.unlink(missing_ok=True)
    sync_folder(layout.base)
    journal.log(layout, "service", removed=manager.name)
    return {"removed": manager.name}


def read_service(layout: Layout) -> dict[str, Any]:
    """Return whether the service is installed and active, its name, address and own memory."""
    if not layout.service.exists():
        return {"installed": False, "active": False, "memory_bytes": 0}
    manager, stored = choose_manager(layout), _read_stored(layout)
    pid = manager.find_pid()
    return {
        "installed": True,
        "active": pid is not None,
        "name": manager.name,
        "port": stored["port"],
        "host": stored["host"],
        "address": _find_address(stored),
        "has_token": _find_token(layout).exists(),
        "memory_bytes": read_own_memory_bytes(pid) if pid else 0,
    }


def pause_service(layout: Layout) -> dict[str, Any]:
    """Stop the service until it is started again, the push ends, or the device boots."""
    write_json(layout.service, {**_read_stored(layout), "is_paused": True})
    choose_manager(layout).stop()
    return read_service(layout)


def resume_service(layout: Layout) -> None:
    """Start a service that a push has paused, without waiting for it."""
    if layout.service.exists() and _read_stored(layout).get("is_paused"):
        start_service(layout)


def start_service(layout: Layout) -> None:
    """Start the service anew, if there is one; whatever goes wrong is in its log."""
    if not layout.service.exists():
        return
    with contextlib.suppress(Failure, OSError):
        choose_manager(layout).restart()
        write_json(layout.service, {**_read_stored(layout), "is_paused": False})


def restart_service(layout: Layout) -> dict[str, Any]:
    """Start the service anew and wait until it answers; Failure with its last words otherwise."""
    manager, stored = choose_manager(layout), _read_stored(layout)
    release, url = read_link(layout.current), f"{_find_url(stored)}/health"
    manager.stop()
    if is_answered(url):
        raise Failure(
            "service", f"another program answers on port {stored['port']}", "take another: --port"
        )
    start_service(layout)
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while not is_answered(url):
        if manager.has_failed() or time.monotonic() > deadline_s:
            words = read_log(layout, SERVICE_LOG).strip().splitlines()[-3:]
            raise Failure(
                "service",
                f"the service {manager.name} does not answer: {' | '.join(words) or 'no words'}",
                "look into it: phiship logs DEVICE",
            )
        time.sleep(POLL_S)
    if read_link(layout.current) != release:
        raise Failure("service", f"{release} does not serve; the service is back on the good one")
    return read_service(layout)


def _write(layout: Layout, stored: dict[str, Any], token: str | None) -> None:
    """Write the service's files; `stored` is what read_service needs to know."""
    path = _find_token(layout)
    path.unlink(missing_ok=True)
    if token is not None:
        _write_token(path, token)
    write_json(layout.service, stored)
    named = [] if token is None else ["--token-file", str(path)]
    choose_manager(layout).write([*stored["arguments"], *named])


def _find_token(layout: Layout) -> Path:
    return layout.base / "token"


def _find_address(stored: dict[str, Any]) -> str:
    """Return where the service can be reached from this machine itself."""
    return LOOPBACK if stored["host"] in ("0.0.0.0", "::", "") else str(stored["host"])


def _find_url(stored: dict[str, Any]) -> str:
    host = _find_address(stored)
    return f"http://[{host}]:{stored['port']}" if ":" in host else f"http://{host}:{stored['port']}"


def _write_token(path: Path, token: str) -> None:
    descriptor = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(token)


def _read_stored(layout: Layout) -> dict[str, Any]:
    if not layout.service.exists():
        raise Failure("service", "no service is installed", "phiship serve DEVICE --install")
    stored: dict[str, Any] = json.loads(layout.service.read_text(encoding="utf-8"))
    return stored
