"""A Raspberry Pi 5 as a whole machine: its own kernel, its own disk, and a plug to pull."""

import signal
import subprocess
import time
from pathlib import Path

from tests.cache import keep, remove, run_quietly
from tests.deploy.sshd import LOOPBACK, find_free_port
from tests.emulated.identity import COMPATIBLE, HOST_NAME, MODEL
from tests.emulated.kernel import make_kernel
from tests.emulated.rootfs import (
    CONFIGURE,
    CPU,
    PACKAGES,
    RUNTIME_PYTHON,
    SSHD_CONFIG,
    SUITE,
    install_runtimes,
    name_runtimes,
    open_door,
    unpack_rootfs,
)
from tests.emulated.ssh import describe_board, run_there, wait_for_ssh
from toolkit.device import Device

DISK_SIZE = "2G"
MEMORY_MIB = 1024
GUEST_PORT = 22
BOOT_TIMEOUT_S = 180
RUNTIMES = ("xllamacpp",)
# Addresses are those that QEMU's user network has for its only guest.
INIT = f"""#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mkdir -p /run/sshd /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
hostname {HOST_NAME}
ip link set lo up
ip address add 10.0.2.15/24 dev eth0
ip link set eth0 up
ip route add default via 10.0.2.2
exec /usr/sbin/sshd -D
"""


def make_disk() -> Path:
    """Return a folder with disk.img and the keys to it; making it takes minutes, once."""
    requirements = name_runtimes(RUNTIMES)
    recipe = [SUITE, PACKAGES, CONFIGURE, SSHD_CONFIG, DISK_SIZE, INIT, requirements]

    def make(folder: Path) -> None:
        root = folder / "root"
        unpack_rootfs(root)
        install_runtimes(root, requirements)
        open_door(root, folder / "keys", GUEST_PORT)
        init = root / "sbin/init"
        init.write_text(INIT, encoding="ascii")
        init.chmod(0o755)
        run_quietly(["mke2fs", "-q", "-t", "ext4", "-d", root, folder / "disk.img", DISK_SIZE])
        remove(root)

    return keep("disk", recipe, make)


class Machine:
    """A board that is switched on by `boot` and off by `cut`; its disk lasts as long as `folder`.

    The disk is a layer of qcow2 over the image. What the guest has not flushed stays in QEMU's
    memory, like in the cache of an SD card, and dies with QEMU as the guest's own page cache does.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kernel = make_kernel()
        disk = make_disk()
        self.keys = disk / "keys"
        self.port = find_free_port()
        self.device: Device = describe_board(self.port, self.keys, RUNTIME_PYTHON)
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        base = str(disk / "disk.img")
        run_quietly(
            ["qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "raw", folder / "disk.qcow2"]
        )
        self._name_board()

    def boot(self) -> float:
        """Switch on and wait for SSH; returns the seconds that took."""
        started_s = time.monotonic()
        with (self.folder / "qemu.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(self.folder / "pi5.dtb"), stdout=log, stderr=log
            )
        process = self._process
        try:
            wait_for_ssh(self.port, lambda: process.poll() is None, BOOT_TIMEOUT_S)
        except TimeoutError as error:
            self.cut()
            logs = (self.folder / name for name in ("qemu.log", "console.log"))
            told = (log.read_text("utf-8", "replace")[-2000:] for log in logs if log.exists())
            raise RuntimeError("\n".join(told)) from error
        return time.monotonic() - started_s

    def cut(self) -> None:
        """Pull the plug: nothing in the machine gets to run once more."""
        if self._process:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def run(self, command: str) -> str:
        """Run a shell command there through ssh, with nothing of phiship; returns its output."""
        return run_there(self.device, self.keys, command)

    def _name_board(self) -> None:
        """Write the device tree that QEMU would give this machine, with the board's name in it."""
        tree = self.folder / "pi5.dtb"
        run_quietly([*self._command(None), "-M", f"dumpdtb={tree}"])
        run_quietly(["fdtput", "-t", "s", tree, "/", "model", MODEL])
        run_quietly(["fdtput", "-t", "s", tree, "/", "compatible", *COMPATIBLE])

    def _command(self, tree: Path | None) -> list[str]:
        """Return QEMU's command line; the disk's flushes are the host's (cache=writeback)."""
        return [
            "nice", "-n", "10", "qemu-system-aarch64", "-M", "virt", "-cpu", CPU, "-smp", "2",
            "-m", str(MEMORY_MIB), "-nodefaults", "-display", "none", "-no-reboot",
            "-serial", f"file:{self.folder / 'console.log'}",
            "-kernel", str(self.kernel / "vmlinuz"), "-initrd", str(self.kernel / "initrd.gz"),
            "-append", "console=ttyAMA0 quiet panic=-1", *(("-dtb", str(tree)) if tree else ()),
            "-drive", f"if=none,id=disk,file={self.folder / 'disk.qcow2'},cache=writeback",
            "-device", "virtio-blk-pci,drive=disk",
            "-netdev", f"user,id=net,hostfwd=tcp:{LOOPBACK}:{self.port}-:{GUEST_PORT}",
            "-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci",
        ]  # fmt: skip
