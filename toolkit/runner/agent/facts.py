"""Facts of the device. Every probe of files takes a root folder, so that records can be replayed.

Linux is read from /proc and /sys; where those are missing a fact is None, never a guess.
"""

from __future__ import annotations

import os
import platform
import struct
import sys
from pathlib import Path
from typing import Any

from .layout import Layout

# Instruction sets that decide which kernels a runtime can use.
CPU_FEATURES = ("asimd", "asimddp", "i8mm", "sve", "avx2", "avx512f", "avx512_vnni", "avx_vnni")


def read_facts(layout: Layout, root: Path = Path("/")) -> dict[str, Any]:
    """Return all facts that need no child process."""
    memory = read_memory(root)
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "word_bits": struct.calcsize("P") * 8,
        "libc": " ".join(platform.libc_ver()).strip(),
        "python": platform.python_version(),
        "python_path": sys.executable,
        "board": read_board(root),
        "cpu_count": os.cpu_count() or 1,
        "cpu_features": read_cpu_features(root),
        "memory_total_bytes": memory.get("MemTotal"),
        "memory_available_bytes": memory.get("MemAvailable"),
        "memory_limit_bytes": read_memory_limit(root),
        "disk_free_bytes": layout.count_free_bytes(),
        "root": str(layout.base),
    }


def read_memory(root: Path) -> dict[str, int]:
    """Return /proc/meminfo in bytes; empty where there is none."""
    path = root / "proc/meminfo"
    if not path.exists():
        return {}
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}


def read_memory_limit(root: Path) -> int | None:
    """Return what the control group still allows; None without a limit."""
    pairs = (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        (
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    )
    for limit_name, used_name in pairs:
        limit, used = _read_number(root / limit_name), _read_number(root / used_name)
        # Version 1 says "no limit" by a number near 2 ** 63.
        if limit is not None and used is not None and limit < 1 << 60:
            return max(0, limit - used)
    return None


def read_board(root: Path) -> str:
    """Return the board's own name, such as Raspberry Pi 5 Model B; empty on most PCs."""
    path = root / "proc/device-tree/model"
    if not path.exists():
        return ""
    return path.read_bytes().rstrip(b"\0").decode("utf-8", "replace")


def read_cpu_features(root: Path) -> list[str]:
    """Return those of CPU_FEATURES that /proc/cpuinfo names."""
    path = root / "proc/cpuinfo"
    if not path.exists():
        return []
    words: set[str] = set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.lower().startswith(("flags", "features")):
            words.update(line.partition(":")[2].split())
    return [name for name in CPU_FEATURES if name in words]


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
