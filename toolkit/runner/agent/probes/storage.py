"""Where the root folder lies: file system, room, and whether it can be written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .interpreter import Interpreter
from .reading import Run, read_text

MAC_DATA = "/System/Volumes/Data"


def read_storage(root: Path, run: Run, python: Interpreter) -> dict[str, Any]:
    """Return root, disk_free_bytes, disk_file_system, disk_is_writable."""
    is_mac = python.system == "Darwin"
    mounts = _parse_mac_mounts(run(["mount"]) or "") if is_mac else _read_mounts(root)
    mount = _find_mount(mounts, python.root)
    is_read_only = mount is not None and {"ro", "read-only"} & set(mount[2].split(","))
    return {
        "root": python.root,
        "disk_free_bytes": python.root_free_bytes,
        "disk_file_system": mount[1] if mount else None,
        "disk_is_writable": python.root_is_writable and not is_read_only,
    }


def _read_mounts(root: Path) -> list[tuple[str, str, str]]:
    """Return mount point, file system and options of every mount."""
    text = read_text(root / "proc/self/mounts") or read_text(root / "proc/mounts") or ""
    rows = [line.split() for line in text.splitlines()]
    return [(_unescape(row[1]), row[2], row[3]) for row in rows if len(row) >= 4]


def _unescape(path: str) -> str:
    """Undo the octal escapes of /proc/mounts: \\040 is a space."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found.group(1), 8)), path)


def _parse_mac_mounts(text: str) -> list[tuple[str, str, str]]:
    """Read `/dev/disk3s5 on /System/Volumes/Data (apfs, local, journaled)`."""
    rows = re.findall(r"^.+? on (/.*) \(([^,)]+)(?:, )?([^)]*)\)$", text, re.MULTILINE)
    return [(path, kind, options.replace(" ", "")) for path, kind, options in rows]


def _find_mount(mounts: list[tuple[str, str, str]], path: str) -> tuple[str, str, str] | None:
    """Return the innermost mount that holds a path; of several at one place, the last one."""
    parts = Path(path).parts
    holding = [
        mount for mount in mounts if parts[: len(Path(mount[0]).parts)] == Path(mount[0]).parts
    ]
    found = max(reversed(holding), key=lambda mount: len(Path(mount[0]).parts), default=None)
    # macOS: the system's volume is read-only, and what can be written in it links to another one.
    data = [mount for mount in mounts if mount[0] == MAC_DATA]
    return data[0] if data and found is not None and found[0] == "/" else found
