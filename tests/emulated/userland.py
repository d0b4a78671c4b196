"""A Raspberry Pi's userland: aarch64 programs on this kernel, run by qemu-user, behind an sshd."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cache import remove
from tests.deploy.sshd import find_free_port
from tests.emulated.rootfs import open_door, unpack_rootfs
from tests.emulated.ssh import describe_board, wait_for_ssh
from toolkit.device import Device

ROOT = Path(__file__).parent.parent.parent
START_TIMEOUT_S = 60
# Its process namespace ends with it, and so does whatever sessions have left running.
NAMESPACES = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child=SIGKILL")


@contextmanager
def start_userland(folder: Path) -> Iterator[Device]:
    """Yield a board whose files are below `folder`; it has Python and no runtime."""
    root, log = folder / "root", folder / "sshd.log"
    port = find_free_port()
    unpack_rootfs(root)
    open_door(root, folder / "keys", port)
    command = [*NAMESPACES, sys.executable, "-m", "tests.emulated.enter", str(root)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    try:
        wait_for_ssh(port, lambda: process.poll() is None, START_TIMEOUT_S)
        yield describe_board(port, folder / "keys", python="python3")
    except TimeoutError as error:
        raise RuntimeError(log.read_text("utf-8", "replace")) from error
    finally:
        process.kill()
        process.wait()
        remove(root)
