"""One push at a time: a process holds the flock for as long as the pusher keeps its stdin open."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from typing import Any

from ..failure import Failure
from .layout import Layout, read_boot_id

PATIENCE_S = 3.0


def hold_lock(layout: Layout, owner: str, token: str) -> int:
    """Take the lock, say so, and hold it until stdin ends. The kernel frees it when we die."""
    with layout.lock.open("a+", encoding="utf-8") as stream:
        if not _wait_lock(stream.fileno()):
            raise Failure("locked", f"another push is under way: {_describe_owner(layout)}")
        stream.seek(0)
        stream.truncate()
        entry = {"owner": owner, "token": token, "pid": os.getpid(), "time": time.time()}
        json.dump({**entry, "boot_id": read_boot_id()}, stream)
        stream.flush()
        print(json.dumps({"held": token}), flush=True)
        while sys.stdin.buffer.read(1):
            pass
    return 0


def check_lock(layout: Layout, token: str) -> None:
    """Failure unless the push with `token` holds the lock at this moment."""
    with layout.lock.open("a+", encoding="utf-8") as stream:
        if _try_lock(stream.fileno()):
            raise Failure("locked", "this push holds no lock any more; start it again")
    if _read_entry(layout).get("token") != token:
        raise Failure("locked", f"another push is under way: {_describe_owner(layout)}")


def _wait_lock(descriptor: int) -> bool:
    """Take the lock; a push whose connection was just cut needs a moment to let go of it."""
    give_up_s = time.monotonic() + PATIENCE_S
    while not _try_lock(descriptor):
        if time.monotonic() > give_up_s:
            return False
        time.sleep(0.1)
    return True


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_entry(layout: Layout) -> dict[str, Any]:
    try:
        entry: dict[str, Any] = json.loads(layout.lock.read_text(encoding="utf-8"))
    except ValueError:
        return {}  # the holder is just writing it
    return entry


def _describe_owner(layout: Layout) -> str:
    entry = _read_entry(layout)
    age_s = time.time() - float(entry.get("time", time.time()))
    return f"by {entry.get('owner', 'somebody')}, for {age_s:.0f} s"
