"""Reading and writing at an offset, the same on every system.

POSIX has pread and pwrite; where they are missing (Windows) a seek and a read do the same, which is
safe because every worker opens its files itself and uses them from one thread. Linux can also show
a file's bytes where they are, without a copy.
"""

import ctypes
import errno
import mmap
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import BuildError

BINARY = getattr(os, "O_BINARY", 0)
HAS_POSITIONAL = hasattr(os, "preadv") and hasattr(os, "pwrite")

# Parameters of madvise (sys/mman.h); older Linux than 5.14 refuses the second.
DONT_NEED, POPULATE_READ = 4, 22
AROUND_BYTES = 1 << 21  # With a page, others up to such a boundary may be mapped.

Bytes = NDArray[np.uint8]


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


@dataclass(frozen=True)
class MappedFile:
    """A file's bytes where they lie in the system's cache, without a copy."""

    content: Bytes

    def load(self, offset: int, size: int) -> Bytes | None:
        """View a part, which is read now; None when it cannot be: `read_at` says why.

        Otherwise an error of the disk, or the end of a file that was cut short, would end the
        process at the first touch.
        """
        if offset + size > self.content.size or not self._advise(offset, size, POPULATE_READ):
            return None
        return self.content[offset : offset + size]

    def unload(self, offset: int, size: int) -> None:
        """Let go of a part that was loaded; it stays in the system's cache."""
        before = offset % AROUND_BYTES
        self._advise(offset - before, size + before, DONT_NEED)

    def _advise(self, offset: int, size: int, advice: int) -> bool:
        """Whether madvise took the pages of a part."""
        before = offset % mmap.PAGESIZE
        address = self.content.ctypes.data + offset - before
        return bool(_load_madvise()(address, size + before, advice) == 0)


@cache
def _load_madvise() -> Any:
    """The system's, which lets other threads run meanwhile; Python's does not."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise


def map_file(path: Path) -> MappedFile | None:
    """Map a file without reading it; None where that does not go."""
    if sys.platform != "linux":
        return None
    descriptor = open_to_read(path)
    try:
        content = mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    except (OSError, ValueError):  # no addresses left, or an empty file
        return None
    finally:
        os.close(descriptor)
    return MappedFile(np.frombuffer(content, np.uint8))


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
    """Create `path` with `size_bytes`, its blocks reserved where the system can.

    BuildError when the disk is full, or when `path` is there already or cannot be created.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o644)
        try:
            _allocate(descriptor, size_bytes)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise explain_write_error(error, path) from error


def _allocate(descriptor: int, size_bytes: int) -> None:
    if hasattr(os, "posix_fallocate") and size_bytes:
        try:
            return os.posix_fallocate(descriptor, 0, size_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(descriptor, size_bytes)
    return None


def write_start(path: Path, content: bytes) -> None:
    """Write `content` at the start of an existing file."""
    descriptor = open_to_write(path)
    try:
        write_at(descriptor, memoryview(content), 0)
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Make a file's content durable."""
    descriptor = os.open(path, os.O_RDWR | BINARY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Make a folder's entries durable, where the system can (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(text: str, path: Path) -> None:
    """Write a text file as UTF-8, all of it or nothing; BuildError when that fails."""
    try:
        descriptor, part = tempfile.mkstemp(prefix=f".{path.name[:100]}-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
            Path(part).chmod(0o666 & ~_read_umask())
            Path(part).replace(path)
        except BaseException:
            Path(part).unlink()
            raise
    except OSError as error:
        raise BuildError(f"{path}: cannot be written: {error.strerror or error}") from None


def _read_umask() -> int:
    """The permissions that new files lack here; mkstemp's are the owner's alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
