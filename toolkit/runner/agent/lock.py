"""One push at a time: the agent of a push holds a flock, which the kernel frees when it dies."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from typing import Any, TextIO

from ..failure import Failure
from .layout import Layout, read_boot_id

PATIENCE_S = 3.0


class Lock:
    """The lock, held until this process ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def beat(self) -> None:
        """Leave a sign of life: the file's time."""
        os.utime(self._stream.fileno())


def take(layout: Layout, owner: str) -> Lock:
    """Take the lock for `owner`; Failure `locked` says who has it.

    A push whose connection was just cut needs a moment to let go of it.
    """
    stream = layout.lock.open("a+", encoding="utf-8")
    if not _wait(stream.fileno()):
        stream.close()
        raise Failure(
            "locked",
            f"another push is under way: {_describe_owner(layout)}",
            "wait for its end; if its machine is gone: phiship unlock DEVICE --force",
        )
    stream.seek(0)
    stream.truncate()
    entry = {"owner": owner, "pid": os.getpid(), "time": time.time(), "boot_id": read_boot_id()}
    json.dump(entry, stream)
    stream.flush()
    return Lock(stream)


def unlock(layout: Layout, *, force: bool) -> dict[str, Any]:
    """Say who holds the lock; with `force`, kill the agent of that push."""
    with layout.lock.open("a+", encoding="utf-8") as stream:
        if _try(stream.fileno()):
            return {"holder": None, "unlocked": False}
        holder, pid = _describe_owner(layout), _read_entry(layout).get("pid")
        if not force or pid is None:
            return {"holder": holder, "unlocked": False}
        os.kill(pid, signal.SIGKILL)
        if not _wait(stream.fileno()):
            raise Failure("locked", f"process {pid} does not end: {holder}", "restart the device")
    return {"holder": holder, "unlocked": True}


def _wait(descriptor: int) -> bool:
    give_up_s = time.monotonic() + PATIENCE_S
    while not _try(descriptor):
        if time.monotonic() > give_up_s:
            return False
        time.sleep(0.1)
    return True


def _try(descriptor: int) -> bool:
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
    entry, now = _read_entry(layout), time.time()
    age_s = max(0.0, now - float(entry.get("time", now)))
    silent_s = max(0.0, now - layout.lock.stat().st_mtime)
    owner = entry.get("owner", "somebody")
    return f"by {owner}, for {age_s:.0f} s, last sign of life {silent_s:.0f} s ago"
