"""Memory: what there is, what is available, what a control group still allows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .reading import Run, read_number, read_text

# Version 1 says "no limit" by a number near 2 ** 63.
UNLIMITED_BYTES = 1 << 60


def read_memory(root: Path, run: Run, sysctl: dict[str, str]) -> dict[str, Any]:
    """Return memory_total_, memory_available_, memory_limit_ and swap_free_bytes."""
    if sysctl:
        total = sysctl.get("hw.memsize", "")
        available, swap = read_vm_stat(run(["vm_stat"]) or ""), None
        total_bytes = int(total) if total.isdigit() else None
    else:
        found = read_meminfo(root)
        total_bytes, available = found.get("MemTotal"), found.get("MemAvailable")
        swap = found.get("SwapFree")
    return {
        "memory_total_bytes": total_bytes,
        "memory_available_bytes": available,
        "memory_limit_bytes": read_memory_limit(root),
        "swap_free_bytes": swap,
    }


def read_meminfo(root: Path) -> dict[str, int]:
    """Return /proc/meminfo in bytes; empty where there is none."""
    text = read_text(root / "proc/meminfo") or ""
    pairs = re.findall(r"^(\w+):\s+([0-9]{1,15}) kB$", text, re.MULTILINE)
    return {name: int(count) * 1024 for name, count in pairs}


def read_vm_stat(text: str) -> int | None:
    """Return available bytes of macOS: free, speculative and inactive pages, as psutil counts them.

    Purgeable pages are left out: they are among the active or inactive ones.
    """
    size = re.search(r"page size of (\d{1,9}) bytes", text)
    pages = dict(re.findall(r"^Pages (free|speculative|inactive):\s+(\d{1,15})", text, re.M))
    if size is None or len(pages) < 3:
        return None
    return int(size.group(1)) * sum(map(int, pages.values()))


def read_memory_limit(root: Path) -> int | None:
    """Return what the control groups of this process still allow; None without a limit.

    Every group up to the top limits its members; the tightest counts.
    """
    rests = [
        rest
        for folder, names in _list_groups(root)
        if (rest := _read_rest(folder, *names)) is not None
    ]
    return min(rests, default=None)


# Files of a group: limit, use, and the key in memory.stat of what the kernel drops when it must.
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _list_groups(root: Path) -> list[tuple[Path, tuple[str, str, str]]]:
    """Return our groups' folders from the innermost to the top, of both versions.

    A container without a namespace of its own sees a path that is not there; its own group is then
    mounted at the top.
    """
    paths = _read_group_paths(root)
    top = root / "sys/fs/cgroup"
    return [
        *((folder, VERSION_2) for folder in _climb(top, paths.get("", "/"))),
        *((folder, VERSION_1) for folder in _climb(top / "memory", paths.get("memory", "/"))),
    ]


def _read_group_paths(root: Path) -> dict[str, str]:
    """Return our group by controller, from lines such as 0::/user.slice or 4:memory:/docker/12."""
    paths = {}
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        paths.update(dict.fromkeys(names.split(","), path))
    return paths


def _climb(mount: Path, path: str) -> list[Path]:
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _read_rest(folder: Path, limit: str, use: str, droppable: str) -> int | None:
    limit_bytes, used_bytes = read_number(folder / limit), read_number(folder / use)
    if limit_bytes is None or used_bytes is None or limit_bytes >= UNLIMITED_BYTES:
        return None
    # Files just received count as use, and are dropped when memory is needed.
    text = read_text(folder / "memory.stat") or ""
    found = re.search(rf"^{droppable} ([0-9]{{1,20}})$", text, re.MULTILINE)
    return max(0, limit_bytes - used_bytes + (int(found.group(1)) if found else 0))
