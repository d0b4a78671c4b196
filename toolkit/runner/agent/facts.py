"""Facts of the device: all that the host needs to judge whether an artifact can run here.

Nothing here raises for what a device lacks, and few programs are started: none on a PC, one on a
Raspberry Pi or Jetson, two in Termux, four on a Mac. Names of hosts, serial numbers and addresses
are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .layout import Layout
from .probes.accelerators import read_accelerators
from .probes.health import read_health
from .probes.identity import read_identity
from .probes.interpreter import Interpreter, ask_interpreter
from .probes.memory import read_memory, read_memory_limit
from .probes.processor import APPLE_FEATURES, read_processor
from .probes.reading import Run, run_command, run_nothing
from .probes.storage import read_storage

__all__ = ["read_facts", "read_memory_limit"]

SYSCTL_NAMES = ("hw.memsize", "hw.model", "machdep.cpu.brand_string", *APPLE_FEATURES)


def read_facts(
    layout: Layout,
    root: Path = Path("/"),
    run: Run | None = None,
    python: Interpreter | None = None,
) -> dict[str, Any]:
    """Return all facts but the engine's, by the names of toolkit.device.Facts.

    Files are read below `root`; programs are started by `run`, by default none of this machine's
    where `root` is another's; `python` replaces what this interpreter and its system calls tell.
    """
    python = python or ask_interpreter(layout)
    run = run or (run_command if root == Path("/") else run_nothing)
    sysctl = _ask_sysctl(run) if python.system == "Darwin" else {}
    facts = {
        "system": python.system,
        "machine": python.machine,
        "word_bits": python.word_bits,
        "python": python.version,
        "python_path": python.path,
        "has_venv": python.has_venv,
        **read_identity(root, run, python),
        **read_processor(root, python, sysctl),
        **read_memory(root, run, sysctl),
        **read_storage(root, run, python),
        **read_accelerators(root, run, python, sysctl),
        **read_health(root, run, python),
    }
    if python.system == "Darwin":
        facts["board"] = sysctl.get("hw.model", "")
    return facts


def _ask_sysctl(run: Run) -> dict[str, str]:
    """Return macOS's settings by name; one that this version lacks is left out."""
    text = run(["sysctl", *SYSCTL_NAMES]) or ""
    return dict(re.findall(r"^([\w.]+): (.*)$", text, re.MULTILINE))
