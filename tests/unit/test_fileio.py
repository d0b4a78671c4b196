"""Files at an offset: with pread and without it the same bytes, and disk errors as sentences."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit import fileio
from toolkit.errors import BuildError

CONTENT = bytes(range(256)) * 40


@pytest.fixture(params=[True, False], ids=["pread", "seek"])
def positional(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pread and pwrite, and as on a system that lacks them."""
    if request.param:
        assert fileio.HAS_POSITIONAL or not hasattr(os, "preadv")
        return
    monkeypatch.setattr(fileio, "HAS_POSITIONAL", False)
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.delattr(os, "pwrite", raising=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of 10 KiB."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


@settings(deadline=None)
@given(offset=st.integers(0, len(CONTENT)), size=st.integers(0, len(CONTENT)))
def test_read_anywhere(tmp_path_factory: pytest.TempPathFactory, offset: int, size: int) -> None:
    path = tmp_path_factory.getbasetemp() / "read-anywhere"
    path.write_bytes(CONTENT)
    size = min(size, len(CONTENT) - offset)
    found = []
    for has_positional in (fileio.HAS_POSITIONAL, False):
        descriptor = fileio.open_to_read(path)
        view = bytearray(size)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fileio, "HAS_POSITIONAL", has_positional)
            fileio.read_at(descriptor, memoryview(view), offset)
        os.close(descriptor)
        found.append(bytes(view))
    assert found[0] == found[1] == CONTENT[offset : offset + size]


@pytest.mark.usefixtures("positional")
def test_read_past_the_end(path: Path) -> None:
    descriptor = fileio.open_to_read(path)
    with pytest.raises(EOFError, match="file ends 5 bytes too early"):
        fileio.read_at(descriptor, memoryview(bytearray(10)), len(CONTENT) - 5)
    os.close(descriptor)


@pytest.mark.usefixtures("positional")
def test_write_in_any_order(path: Path) -> None:
    descriptor = fileio.open_to_write(path)
    for offset, text in ((5000, b"last"), (0, b"first"), (100, b"")):
        fileio.write_at(descriptor, memoryview(text), offset)
    os.close(descriptor)
    expected = bytearray(CONTENT)
    expected[5000:5004], expected[:5] = b"last", b"first"
    assert path.read_bytes() == expected


@pytest.mark.usefixtures("positional")
def test_newlines_are_bytes(path: Path) -> None:
    """Windows would translate them in text mode."""
    descriptor = fileio.open_to_write(path)
    fileio.write_at(descriptor, memoryview(b"\r\n\x1a\n"), 0)
    os.close(descriptor)
    descriptor = fileio.open_to_read(path)
    view = bytearray(4)
    fileio.read_at(descriptor, memoryview(view), 0)
    os.close(descriptor)
    assert view == b"\r\n\x1a\n"


def test_arrays_are_viewed_not_copied() -> None:
    array = np.zeros((3, 4), np.float32)
    view = fileio.as_bytes(array)
    view[0:4] = np.float32(1.5).tobytes()
    assert len(view) == 48 and array[0, 0] == 1.5


@pytest.mark.usefixtures("positional")
def test_full_disk(path: Path) -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(BuildError, match=r"the disk is full \(No space left on device\)") as caught:
        fileio.write_at(descriptor, memoryview(b"x"), 0)
    os.close(descriptor)
    assert "--out" in caught.value.advice


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_has_three_names(code: int, tmp_path: Path) -> None:
    error = fileio.explain_write_error(OSError(code, os.strerror(code)), tmp_path)
    assert str(error) == f"{tmp_path}: the disk is full ({os.strerror(code)})"


def test_other_write_errors() -> None:
    error = fileio.explain_write_error(PermissionError(errno.EACCES, "Permission denied"))
    assert str(error) == "cannot be written: Permission denied"


def test_reserve(tmp_path: Path) -> None:
    path = tmp_path / "new"
    fileio.reserve(path, 1 << 20)
    assert path.stat().st_size == 1 << 20
    assert path.read_bytes() == bytes(1 << 20)
    fileio.reserve(tmp_path / "empty", 0)
    assert (tmp_path / "empty").stat().st_size == 0


def test_reserve_without_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS and Windows have none, and some file systems refuse it."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    fileio.reserve(tmp_path / "new", 1000)

    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    fileio.reserve(tmp_path / "other", 1000)
    assert (tmp_path / "new").stat().st_size == (tmp_path / "other").stat().st_size == 1000


def test_reserve_never_overwrites(path: Path) -> None:
    with pytest.raises(BuildError, match=rf"{path}: cannot be written: File exists"):
        fileio.reserve(path, 10)
    assert path.read_bytes() == CONTENT
    with pytest.raises(BuildError, match="No such file or directory"):
        fileio.reserve(path.parent / "missing" / "file", 10)


def test_reserve_more_than_there_is(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path; from toolkit import fileio\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "fileio.reserve(Path(sys.argv[1]), 5000)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "new")]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert f"BuildError: {tmp_path / 'new'}: the disk is full" in done.stderr


def test_start_and_durability(path: Path) -> None:
    fileio.write_start(path, b"header")
    fileio.sync(path)
    fileio.sync_folder(path.parent)
    assert path.read_bytes() == b"header" + CONTENT[6:]
