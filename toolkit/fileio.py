"""Reading and writing at an offset, the same on every system.

POSIX has pread and pwrite; where they are missing (Windows) a seek and a read do the same, which is
safe because every process opens its files itself and uses them from one thread.
"""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import BuildError

BINARY = getattr(os, "O_BINARY", 0)
HAS_POSITIONAL = hasattr(os, "preadv") and hasattr(os, "pwrite")


def as_bytes(array: NDArray[Any]) -> memoryview:
    """View a contiguous array as bytes, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def open_to_read(path: Path) -> int:
    """Open a file for reading; returns its descriptor."""
    return os.open(path, os.O_RDONLY | BINARY)


def open_to_write(path: Path) -> int:
    """Open an existing file for writing in place; returns its descriptor."""
    return os.open(path, os.O_WRONLY | BINARY)


def read_at(descriptor: int, view: memoryview, offset: int) -> None:
    """Fill `view` (bytes) from `offset`; EOFError when the file ends before."""
    done = 0
    while done < len(view):
        if HAS_POSITIONAL:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        else:
            os.lseek(descriptor, offset + done, os.SEEK_SET)
            piece = os.read(descriptor, len(view) - done)
            view[done : done + len(piece)] = piece
            count = len(piece)
        if count == 0:
            raise EOFError(f"file ends {len(view) - done} bytes too early")
        done += count


def write_at(descriptor: int, view: memoryview, offset: int) -> None:
    """Write `view` (bytes) at `offset`; BuildError when the disk is full."""
    done = 0
    try:
        while done < len(view):
            if HAS_POSITIONAL:
                done += os.pwrite(descriptor, view[done:], offset + done)
            else:
                os.lseek(descriptor, offset + done, os.SEEK_SET)
                done += os.write(descriptor, view[done:])
    except OSError as error:
        raise explain_write_error(error) from error


def explain_write_error(error: OSError, path: Path | None = None) -> BuildError:
    """Turn an OSError met while writing into a BuildError with a next step."""
    where = f"{path}: " if path else ""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", -1), errno.EFBIG):
        return BuildError(
            f"{where}the disk is full ({os.strerror(error.errno or 0)})",
            advice="`phiship plan` says how much is needed; free space or choose another --out",
        )
    return BuildError(f"{where}cannot be written: {error.strerror or error}")


def reserve(path: Path, size_bytes: int) -> None:
    """Create `path` with `size_bytes`, its blocks reserved where the system can."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o644)
    try:
        if hasattr(os, "posix_fallocate") and size_bytes:
            os.posix_fallocate(descriptor, 0, size_bytes)
        else:
            os.ftruncate(descriptor, size_bytes)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            os.ftruncate(descriptor, size_bytes)
        else:
            raise explain_write_error(error, path) from error
    finally:
        os.close(descriptor)
