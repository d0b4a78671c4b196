"""What the device is: C library, board, version of its system."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .interpreter import Interpreter
from .reading import Run, is_there, list_paths, read_text


def read_identity(root: Path, run: Run, python: Interpreter) -> dict[str, Any]:
    """Return libc, board, board_compatible, system_version, is_termux."""
    facts = {
        "libc": read_libc(root, python),
        "board": read_board(root),
        "board_compatible": _read_compatible(root),
        "system_version": _read_release(root),
        "is_termux": python.is_termux,
    }
    if python.is_termux:
        facts["board"] = (run(["getprop", "ro.product.model"]) or "").strip()
        version = (run(["getprop", "ro.build.version.release"]) or "").strip()
        facts["system_version"] = f"Android {version}" if version else None
    if python.system == "Darwin":
        version = (run(["sw_vers", "-productVersion"]) or "").strip()
        facts["system_version"] = f"macOS {version}" if version else None
    return facts


def read_libc(root: Path, python: Interpreter) -> str:
    """Return name and version: "glibc 2.36", "musl", "bionic"; "none" on macOS; empty: unknown.

    Wheels are built for one of them: manylinux for glibc, musllinux for musl.
    """
    if python.system == "Darwin":
        return "none"
    if python.libc:
        return python.libc
    if is_there(root / "system/bin/linker64"):  # Android, in Termux too
        return "bionic"
    return "musl" if list_paths(root / "lib", "ld-musl-*.so.1") else ""


def read_board(root: Path) -> str:
    """Return the board's own name, such as Raspberry Pi 5 Model B, or a PC's product name."""
    model = read_text(root / "proc/device-tree/model")
    if model:
        return model.strip()
    folder = root / "sys/class/dmi/id"
    words = [read_text(folder / name) for name in ("sys_vendor", "product_name")]
    return " ".join(word.strip() for word in words if word and word.strip())


def _read_compatible(root: Path) -> list[str] | None:
    """Return the device tree's names of the board, most special first."""
    text = read_text(root / "proc/device-tree/compatible")
    return [name for name in text.split("\0") if name] if text else None


def _read_release(root: Path) -> str | None:
    """Return the distribution as it calls itself: Debian GNU/Linux 12 (bookworm)."""
    text = read_text(root / "etc/os-release") or read_text(root / "usr/lib/os-release") or ""
    found = re.search(r"^PRETTY_NAME=\"?([^\"\n]*)", text, re.MULTILINE)
    return found.group(1) if found else None
