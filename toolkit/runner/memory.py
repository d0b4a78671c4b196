"""Memory of this process and of the device."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from .agent.probes.memory import read_meminfo, read_memory_limit, read_vm_stat
from .agent.probes.reading import list_paths, read_text, run_command


def read_peak_memory_bytes() -> int:
    """Return the most resident memory this process and those it has started ever had, added up.

    Linux: VmHWM, because ru_maxrss counts what the parent held before exec as well; children,
    because an engine may be a program of its own.
    """
    if Path("/proc/self/status").exists():
        return sum(_read_size(folder, "VmHWM") for folder in _list_family(Path("/proc/self")))
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read_own_memory_bytes(pid: int) -> int:
    """Return what a process and those it has started hold, without files that they map.

    The system counts these among what is available. 0 where it does not tell.
    """
    return sum(_read_size(folder, "RssAnon") for folder in _list_family(Path("/proc", str(pid))))


def _read_size(folder: Path, name: str) -> int:
    """Return a size in a process's status, in bytes; 0 when it has ended."""
    text = read_text(folder / "status") or ""
    found = re.search(rf"^{name}:\s+([0-9]+) kB$", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def _list_family(folder: Path) -> Iterator[Path]:
    """Yield a process's folder below /proc, and those of all it has started that still run."""
    yield folder
    for path in list_paths(folder, "task/*/children"):
        for pid in (read_text(path) or "").split():
            yield from _list_family(Path("/proc", pid))


def read_available_bytes() -> int | None:
    """Return available memory or the control groups' rest, the smaller; None when unknown."""
    root = Path("/")
    if sys.platform == "darwin":
        available = read_vm_stat(run_command(["vm_stat"]) or "")
    else:
        available = read_meminfo(root).get("MemAvailable")
    known = (available, read_memory_limit(root))
    return min((count for count in known if count is not None), default=None)
