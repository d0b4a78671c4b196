"""Becomes the board's sshd; userland.py starts it in mount, UTS and process namespaces of its own.

It runs as a program, with the root folder of the userland as its argument.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from tests.emulated.identity import COMPATIBLE, HOST_NAME, MODEL, PROC_FILES
from tests.emulated.rootfs import CPU

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "QEMU_CPU": CPU}
SSHD = ("/usr/sbin/sshd", "-D", "-e")


def main(root: Path) -> None:
    """Mount what a board has, and run its sshd in place of this process."""
    mount("--make-rprivate", "/")
    mount("--rbind", "/dev", str(root / "dev"))
    mount_proc(root / "proc")
    socket.sethostname(HOST_NAME)
    os.chroot(root)
    os.chdir("/")
    os.execve(SSHD[0], SSHD, ENVIRONMENT)


def mount_proc(proc: Path) -> None:
    """Mount a folder of links to the real /proc, except for what tells which board this is.

    Nothing can be made in a real /proc, and one of a PC has no device-tree.
    """
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(proc))
    real = proc / ".real"
    real.mkdir()
    mount("-t", "proc", "proc", str(real))
    for path in PROC_FILES:
        shutil.copy(path, proc / path.name)
    tree = proc / "device-tree"
    tree.mkdir()
    (tree / "model").write_text(MODEL + "\0", encoding="ascii")
    (tree / "compatible").write_text("".join(name + "\0" for name in COMPATIBLE), encoding="ascii")
    for path in real.iterdir():
        if not path.name.isdigit() and not (proc / path.name).exists():
            (proc / path.name).symlink_to(Path(".real") / path.name)


def mount(*words: str) -> None:
    """Run mount; CalledProcessError when it is refused."""
    subprocess.run(["mount", *words], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
