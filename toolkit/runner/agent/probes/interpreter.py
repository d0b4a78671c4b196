"""What the interpreter and system calls tell, which no file does; a record gives it as values."""

from __future__ import annotations

import importlib.util
import os
import platform
import pwd
import struct
import sys
import time
from dataclasses import dataclass

from ..layout import Layout


@dataclass(frozen=True)
class Interpreter:
    """This Python and the system under it; `libc` is as the C library itself says, or empty."""

    system: str
    machine: str
    word_bits: int
    libc: str
    version: str
    path: str
    has_venv: bool
    cpu_count: int
    clock_s: float
    user_id: int
    user: str
    root: str
    root_free_bytes: int
    root_is_writable: bool
    prefix: str = "/usr"

    @property
    def is_termux(self) -> bool:
        """True for Termux's own Python, which is Android's Linux with another C library."""
        # As $PREFIX says there, which a command over SSH may not have.
        return self.prefix.startswith("/data/data/com.termux/")


def ask_interpreter(layout: Layout) -> Interpreter:
    """Describe the Python that runs us; no child process, nothing imported but the library."""
    base = layout.base
    return Interpreter(
        system=platform.system(),
        machine=platform.machine(),
        word_bits=struct.calcsize("P") * 8,
        libc=_ask_libc(),
        version=platform.python_version(),
        path=sys.executable,
        has_venv=importlib.util.find_spec("venv") is not None,
        cpu_count=_count_cpus(),
        clock_s=time.time(),
        user_id=os.getuid(),
        user=_ask_user(),
        root=str(base),
        root_free_bytes=layout.count_free_bytes(),
        root_is_writable=os.access(base, os.W_OK),
        prefix=sys.base_prefix,
    )


def _ask_libc() -> str:
    """Return "glibc 2.36" or "musl 1.2.5"; empty where the C library does not say."""
    try:
        text = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, OSError, ValueError):
        text = ""
    name, version = platform.libc_ver()
    return text or (f"{name} {version}".strip() if name in ("glibc", "musl") else "")


def _count_cpus() -> int:
    """Return the processors we may use: fewer than there are, in some containers."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _ask_user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return ""
