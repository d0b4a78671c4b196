"""Writes that survive a power cut: fsync of the file, rename, fsync of the folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable; without it a renamed file can be gone after a power cut."""
    descriptor = os.open(str(folder), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder, for this user alone, and those above it that are missing, durably."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    sync_folder(folder.parent)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file in one durable step."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(path)
    sync_folder(path.parent)


def write_json(path: Path, data: Any) -> None:
    """Replace a small JSON file in one durable step."""
    replace_text(path, json.dumps(data, indent=2, sort_keys=True))


def append_json(path: Path, data: Any) -> None:
    """Append one line of JSON durably; a torn last line of a power cut gets its end first."""
    is_new = not path.exists()
    with path.open("ab+") as stream:
        torn = False
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            torn = stream.read(1) != b"\n"
        stream.write((b"\n" if torn else b"") + json.dumps(data, sort_keys=True).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    if is_new:
        sync_folder(path.parent)


def replace_link(link: Path, target: str) -> None:
    """Point `link` at `target` in one durable step; nobody ever sees it missing."""
    fresh = link.with_name(link.name + ".new")
    if fresh.is_symlink():
        fresh.unlink()
    fresh.symlink_to(target)
    fresh.replace(link)
    sync_folder(link.parent)
