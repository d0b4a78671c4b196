"""Memory of this process and of the device."""

from __future__ import annotations

import sys
from pathlib import Path

from .agent.probes.memory import read_meminfo, read_memory_limit, read_vm_stat
from .agent.probes.reading import run_command


def read_peak_memory_bytes() -> int:
    """Return the most resident memory this process ever had.

    Linux: VmHWM, because ru_maxrss counts what the parent held before exec as well.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read_available_bytes() -> int | None:
    """Return available memory or the control groups' rest, the smaller; None when unknown."""
    root = Path("/")
    if sys.platform == "darwin":
        available = read_vm_stat(run_command(["vm_stat"]) or "")
    else:
        available = read_meminfo(root).get("MemAvailable")
    known = (available, read_memory_limit(root))
    return min((count for count in known if count is not None), default=None)
