"""Debian's kernel for aarch64, and an initial RAM disk that does no more than mount the disk."""

import gzip
import re
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from tests.cache import keep, remove, run_quietly
from tests.emulated.rootfs import SUITE

PACKAGES = ("linux-image-arm64", "busybox-static")
# ext4 asks for crc32c by name, so that it is nobody's dependency.
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "crc32c_generic", "ext4")
BOOT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs dev /dev
while read module; do /bin/busybox insmod "/modules/$module.ko"; done < /modules/order
until [ -b /dev/vda ]; do /bin/busybox sleep 0.05; done
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox mount --move /dev /root/dev
/bin/busybox mount --move /proc /root/proc
/bin/busybox mount --move /sys /root/sys
exec /bin/busybox switch_root /root /sbin/init
"""


def make_kernel() -> Path:
    """Return a folder with vmlinuz and initrd.gz, downloaded and packed the first time."""
    included = f"--include={','.join(PACKAGES)}"
    # Packages are unpacked only: their scripts would make a big RAM disk, by emulation.
    variant = ("--architectures=arm64", "--variant=extract", "--format=directory")
    command = ["mmdebstrap", *variant, included, SUITE]

    def make(folder: Path) -> None:
        root = folder / "packages"
        folder.mkdir()
        run_quietly([*command, root])
        (image,) = (root / "boot").glob("vmlinuz-*")
        shutil.copy(image, folder / "vmlinuz")
        (folder / "initrd.gz").write_bytes(gzip.compress(pack_initrd(root), 1))
        remove(root)

    return keep("kernel", [command, MODULES, BOOT], make)


def pack_initrd(root: Path) -> bytes:
    """Return the RAM disk's archive; its modules are those of the packages below `root`."""
    modules = {path.stem: path for path in (root / "lib/modules").rglob("*.ko")}
    order = sort_modules(modules, MODULES)
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "modules", "dev", "proc")]
    entries += [(name, stat.S_IFDIR | 0o755, b"") for name in ("sys", "root")]
    entries += [
        ("bin/busybox", stat.S_IFREG | 0o755, (root / "bin/busybox").read_bytes()),
        ("init", stat.S_IFREG | 0o755, BOOT.encode("ascii")),
        ("modules/order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in order).encode()),
    ]
    for name in order:
        entries.append((f"modules/{name}.ko", stat.S_IFREG | 0o644, modules[name].read_bytes()))
    return pack_cpio(entries)


def sort_modules(modules: dict[str, Path], wanted: Iterable[str]) -> list[str]:
    """Return `wanted` with all they depend on, in the order in which they can be loaded."""
    order: list[str] = []
    for name in wanted:
        depends = re.search(rb"\0depends=([^\0]*)\0", modules[name].read_bytes())
        needed = depends[1].decode().split(",") if depends and depends[1] else []
        for found in (*sort_modules(modules, needed), name):
            if found not in order:
                order.append(found)
    return order


def pack_cpio(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """Pack (name, mode, content) in the format `newc`, described in the kernel's documentation
    (driver-api/early-userspace/buffer-format).
    """
    archive = bytearray()
    for number, (name, mode, content) in enumerate((*entries, ("TRAILER!!!", 0, b"")), start=1):
        label = name.encode("ascii") + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device and rdevice (two each), name, checksum
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(label), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + label
        archive += bytes(-len(archive) % 4)
        archive += content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)
