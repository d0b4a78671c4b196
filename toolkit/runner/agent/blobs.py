"""Blobs: which are missing, and how one is received."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..failure import Failure
from .durable import sync_folder
from .layout import Layout

CHUNK_BYTES = 1 << 20


def find_missing(layout: Layout, blobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return which blobs have to be sent; those here are hashed again, bad ones count as missing.

    A bad blob stays until its replacement is complete: a release may still be reading it.
    """
    missing, corrupt = [], []
    for blob in blobs:
        path = layout.find_blob(blob["sha256"])
        if not path.is_file():
            missing.append(blob["sha256"])
        elif path.stat().st_size != blob["size_bytes"] or hash_file(path) != blob["sha256"]:
            corrupt.append(blob["sha256"])
    return {
        "missing": missing + corrupt,
        "corrupt": corrupt,
        "free_bytes": layout.count_free_bytes(),
    }


def receive_blobs(layout: Layout, stream: BinaryIO) -> dict[str, Any]:
    """Read a line that announces blobs, then the bytes of each; stops at the first bad one."""
    blobs = json.loads(stream.readline())["blobs"]
    for blob in blobs:
        receive_blob(layout, stream, blob["sha256"], blob["size_bytes"])
    return {"received": len(blobs)}


def receive_blob(layout: Layout, stream: BinaryIO, sha256: str, size_bytes: int) -> None:
    """Read `size_bytes` from `stream` into a blob: hash, fsync, rename, fsync of the folder."""
    blob = layout.find_blob(sha256)
    part = layout.incoming / f"{sha256}.part"
    try:
        found = _write_part(stream, part, size_bytes, layout.count_free_bytes())
    except OSError as error:
        part.unlink()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise Failure(
            "disk_full",
            f"the device's disk is full: {layout.count_free_bytes()} bytes are free, "
            f"{size_bytes} are needed",
        ) from error
    if found != sha256:
        part.unlink()
        raise Failure("corrupt", f"received sha256 {found}, announced was {sha256}")
    part.chmod(0o444)
    part.replace(blob)
    sync_folder(layout.blobs)


def hash_file(path: Path) -> str:
    """Return the hex sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        piece = stream.read(CHUNK_BYTES)
        while piece:
            digest.update(piece)
            piece = stream.read(CHUNK_BYTES)
    return digest.hexdigest()


def _write_part(stream: BinaryIO, part: Path, size_bytes: int, free_bytes: int) -> str:
    """Write the bytes durably and return their sha256; Failure `cut` when the stream ends early.

    What was written stays after a cut: it is what a resume will start from.
    """
    from concurrent.futures import ThreadPoolExecutor  # slow to import, for this alone

    digest = hashlib.sha256()
    done_bytes = 0
    with part.open("wb") as out, ThreadPoolExecutor(1) as hasher:
        while done_bytes < size_bytes:
            piece = stream.read(min(CHUNK_BYTES, size_bytes - done_bytes))
            if not piece:
                raise Failure("cut", f"the transfer ended after {done_bytes} of {size_bytes} bytes")
            done_bytes += len(piece)
            if done_bytes > free_bytes:
                raise OSError(errno.ENOSPC, "quota reached")
            # Hashed while it is written: most boards have a core to spare.
            hashed = hasher.submit(digest.update, piece)
            out.write(piece)
            hashed.result()
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()
