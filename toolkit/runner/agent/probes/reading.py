"""Reading what may not be there: nothing here raises for a device that lacks something."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

# What a program prints; None when it is not there, too slow, or silent.
Run = Callable[[list[str]], "str | None"]

COMMAND_TIMEOUT_S = 2.0
# An SSH command's PATH often lacks the folders of administrators' tools.
MORE_FOLDERS = ("/usr/sbin", "/sbin", "/opt/vc/bin")
# /proc and /sys say 4096 for every size; a file beyond this is none of those we read.
MOST_BYTES = 1 << 20


def run_command(words: list[str]) -> str | None:
    """Return the standard output of a program, whatever its exit status.

    None when it is not installed, takes longer than COMMAND_TIMEOUT_S or prints nothing: some print
    the answer first and then fail for want of rights (nvpmodel -q).
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *MORE_FOLDERS])
    program = shutil.which(words[0], path=path)
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *words[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, timeout=COMMAND_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace") or None


def run_nothing(words: list[str]) -> str | None:
    """Be a device without any program, for a root folder that is not this machine's."""
    del words
    return None


def read_text(path: Path) -> str | None:
    """Return a file's text without the zero bytes that end device tree strings."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES)
    except (OSError, ValueError):  # a path out of damaged text may hold a zero byte
        return None
    return content.rstrip(b"\0").decode("utf-8", "replace")


def read_number(path: Path) -> int | None:
    """Return the whole number a file consists of."""
    return to_number(read_text(path))


def to_number(text: str | None) -> int | None:
    """Return the whole number a text consists of."""
    found = re.fullmatch(r"\s*(-?[0-9]{1,20})\s*", text or "")
    return int(found.group(1)) if found else None


def list_paths(folder: Path, pattern: str) -> list[Path]:
    """Return the paths that match, in order; none when the folder cannot be read."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def is_there(path: Path) -> bool:
    """Return whether a path exists; False also where it may not be asked."""
    try:
        return path.exists()
    except OSError:
        return False
