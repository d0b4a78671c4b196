"""What a PC must have to emulate boards. When they were asked for, a missing thing is a failure."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

# Program or file, and the Debian package it comes in.
USERLAND = {
    "mmdebstrap": "mmdebstrap",
    "arch-test": "arch-test",  # only a recommended package of mmdebstrap, which fails without
    "qemu-aarch64-static": "qemu-user-static",
    "ssh-keygen": "openssh-client",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
}
MACHINE = {
    **USERLAND,
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-img": "qemu-utils",
    "mke2fs": "e2fsprogs",
    "fdtput": "device-tree-compiler",
}
BINFMT = Path("/proc/sys/fs/binfmt_misc")
# The ELF header of an aarch64 program, byte by byte, and which of its bits count.
MAGIC = "7f454c460201010000000000000000000200b700"
MASK = "ffffffffffffff00fffffffffffffffffeffffff"


def check_needs(needs: Mapping[str, str]) -> None:
    """Fail the test, naming every package that is missing, or that root is needed."""
    packages = sorted({package for name, package in needs.items() if not is_there(name)})
    if packages:
        pytest.fail(f"missing here: apt-get install {' '.join(packages)}")
    if os.geteuid() != 0:
        pytest.fail("needs root, for file systems and namespaces: run it with sudo")
    register_aarch64()


def is_there(name: str) -> bool:
    """True when a program can be run, or a file exists."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return Path(name).exists() if name.startswith("/") else bool(shutil.which(name, path=path))


def register_aarch64() -> None:
    """Let the kernel run aarch64 programs; qemu-user-static does it where systemd runs."""
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT], check=True)
    if (BINFMT / "qemu-aarch64").exists():
        return
    interpreter = shutil.which("qemu-aarch64-static")
    # F opens the interpreter now, so that a chroot needs no copy of it.
    line = f":qemu-aarch64:M::{escape(MAGIC)}:{escape(MASK)}:{interpreter}:OCF"
    (BINFMT / "register").write_text(line, encoding="ascii")


def escape(digits: str) -> str:
    """Write hexadecimal digits as binfmt_misc reads them: 7f45 is \\x7f\\x45."""
    return "".join(f"\\x{digits[at : at + 2]}" for at in range(0, len(digits), 2))
