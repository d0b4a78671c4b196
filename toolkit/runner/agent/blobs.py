"""Blobs: which are missing, how much of them is here already, and how they are received."""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..failure import Failure, disk_full
from .durable import sync_folder

if TYPE_CHECKING:
    from .serve import Agent

CHUNK_BYTES = 1 << 20
# An unfinished file is compared at every so many bytes: so much is sent again at most.
PREFIX_STEP_BYTES = 4 << 20
PIPE_BYTES = 1 << 20
RING = 4  # chunks between the input and the hash
FLUSH_BYTES = 64 << 20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Of each unfinished file: its hash at every offset from which it may be continued.
Prefixes = dict[str, dict[int, Any]]


def survey(agent: Agent, blobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return which blobs have to be sent; those here are hashed again, bad ones count as missing.

    Of a file that was under way: the sha256 of what is here up to each offset, for the sender to
    compare with its own. A bad blob stays until its replacement is complete: a release may still
    be reading it.
    """
    layout, missing, corrupt = agent.layout, [], []
    for blob in blobs:
        sha256, size_bytes = blob["sha256"], blob["size_bytes"]
        path = layout.find_blob(sha256)
        if path.is_file():
            if path.stat().st_size == size_bytes and hash_file(path, agent.count) == sha256:
                continue
            corrupt.append(sha256)
        agent.prefixes[sha256] = _hash_prefixes(layout.find_part(sha256), size_bytes, agent.count)
        prefixes = {offset: it.hexdigest() for offset, it in agent.prefixes[sha256].items()}
        missing.append({"sha256": sha256, "prefixes": list(prefixes.items())})
    return {"missing": missing, "corrupt": corrupt, "free_bytes": layout.count_free_bytes()}


def receive(agent: Agent, blobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Read the bytes of each blob, from `from_bytes` on; `corrupt` are those that came out wrong.

    Failure `cut` when the input ends early; what has arrived stays, to be continued.
    """
    _widen_pipe(agent.stdin)
    corrupt = [blob["sha256"] for blob in blobs if not _receive_blob(agent, **blob)]
    return {"received": len(blobs) - len(corrupt), "corrupt": corrupt}


def hash_file(path: Path, count: Callable[[int], None]) -> str:
    """Return the hex sha256 of a file."""
    digest = hashlib.sha256()
    for piece in _read_pieces(path):
        digest.update(piece)
        count(len(piece))
    return digest.hexdigest()


def _hash_prefixes(part: Path, size_bytes: int, count: Callable[[int], None]) -> dict[int, Any]:
    """Hash an unfinished file up to every PREFIX_STEP_BYTES and its end, by offset."""
    prefixes: dict[int, Any] = {}
    if not part.is_file() or part.stat().st_size > size_bytes:
        return prefixes
    digest, done_bytes = hashlib.sha256(), 0
    for piece in _read_pieces(part):
        digest.update(piece)
        count(len(piece))
        done_bytes += len(piece)
        if done_bytes % PREFIX_STEP_BYTES == 0:
            prefixes[done_bytes] = digest.copy()
    prefixes[done_bytes] = digest
    return prefixes


def _read_pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        piece = stream.read(CHUNK_BYTES)
        while piece:
            yield piece
            piece = stream.read(CHUNK_BYTES)


def _receive_blob(agent: Agent, sha256: str, size_bytes: int, from_bytes: int) -> bool:
    """Read the rest of a blob: hash, fsync, rename, fsync of the folder; False when it is wrong."""
    layout = agent.layout
    part = layout.find_part(sha256)
    prefixes = {0: hashlib.sha256(), **agent.prefixes.get(sha256, {})}
    if from_bytes not in prefixes:
        raise Failure("request", f"{sha256} cannot be continued at byte {from_bytes}")
    digest = prefixes[from_bytes].copy()
    free_bytes = layout.count_free_bytes()
    try:
        _write_part(agent, part, digest, from_bytes, size_bytes, free_bytes)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.errno not in FULL:
            raise
        need_bytes = size_bytes - from_bytes
        raise disk_full(f"{free_bytes} bytes are free, {need_bytes} are needed") from error
    if digest.hexdigest() != sha256:
        part.unlink()
        return False
    part.chmod(0o444)
    part.replace(layout.find_blob(sha256))
    sync_folder(layout.blobs)
    return True


def _write_part(
    agent: Agent, part: Path, digest: Any, from_bytes: int, size_bytes: int, free_bytes: int
) -> None:
    """Append what arrives, durably in the end; Failure `cut` when the input ends early.

    Hashing and flushing go on beside it: most boards have cores to spare. What is flushed on the
    way survives a power cut.
    """
    from concurrent.futures import ThreadPoolExecutor  # slow to import, for this alone

    done_bytes = synced_bytes = from_bytes
    # Filled in turn; new ones would cost page faults.
    buffers = itertools.cycle([memoryview(bytearray(CHUNK_BYTES)) for _ in range(RING)])
    hashing: collections.deque[Any] = collections.deque()
    with part.open("r+b" if from_bytes else "wb") as out, ThreadPoolExecutor(1) as hasher:
        if from_bytes:
            out.truncate(from_bytes)
            out.seek(from_bytes)
        with ThreadPoolExecutor(1) as flusher:
            flushed = None
            while done_bytes < size_bytes:
                if len(hashing) == RING:
                    hashing.popleft().result()
                buffer = next(buffers)[: size_bytes - done_bytes]
                piece = buffer[: agent.stdin.readinto(buffer)]
                if not piece:
                    where = f"{done_bytes} of {size_bytes} bytes"
                    raise Failure("cut", f"the transfer ended after {where}")
                done_bytes += len(piece)
                if done_bytes - from_bytes > free_bytes:
                    raise OSError(errno.ENOSPC, "quota reached")
                hashing.append(hasher.submit(digest.update, piece))
                out.write(piece)
                agent.count(len(piece))
                is_idle = flushed is None or flushed.done()
                if done_bytes - synced_bytes >= FLUSH_BYTES and is_idle:
                    synced_bytes = done_bytes
                    flushed = flusher.submit(os.fsync, out.fileno())
        if flushed:
            flushed.result()
        out.flush()
        os.fsync(out.fileno())


def _widen_pipe(stream: io.BufferedIOBase) -> None:
    """Let more bytes wait in the pipe from the SSH server; fewer and longer reads."""
    import fcntl

    if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux, since Python 3.10
        with contextlib.suppress(OSError):  # no pipe, or more than this user may have
            fcntl.fcntl(stream.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
