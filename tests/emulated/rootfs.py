"""A Debian for aarch64 as a Raspberry Pi has it, with a user, an SSH server, and no runtimes.

python -m tests.emulated.rootfs    # bootstraps it ahead of the tests, which keep it
"""

import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tests.cache import keep, run_quietly
from tests.deploy.sshd import make_key

SUITE = "bookworm"
PACKAGES = (
    "base-files", "base-passwd", "bash", "coreutils", "dash", "diffutils", "findutils", "grep",
    "gzip", "hostname", "libc-bin", "login", "mount", "passwd", "procps", "sed", "tar",
    "util-linux", "python3", "python3-venv", "openssh-server", "iproute2", "libgomp1", "libstdc++6",
)  # fmt: skip
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*")
USER = "pi"
USER_ID = 1000
# A password that fits nothing; without one sshd takes the account for locked.
ADD_USER = f"useradd --create-home --shell /bin/bash --uid {USER_ID} --password '*' {USER}"
# The packages are unpacked and not configured: their scripts take minutes in an emulator, and this
# is what is needed of them.
CONFIGURE = (
    'for name in passwd group; do cp "$1/usr/share/base-passwd/$name.master" "$1/etc/$name"; done',
    'touch "$1/etc/shadow"; chroot "$1" pwconv; chroot "$1" ldconfig',
    'chroot "$1" useradd --system --home-dir /run/sshd --shell /usr/sbin/nologin sshd',
    f'chroot "$1" {ADD_USER}',
)
MERGED_USR = "/usr/share/mmdebstrap/hooks/merged-usr"
DEVICE_PYTHON = "3.11"  # bookworm's
RUNTIME = Path("opt/runtime")
RUNTIME_PYTHON = f"/{RUNTIME}/bin/python3"
# glibc 2.36 is bookworm's, 2.17 the oldest that wheels for aarch64 name.
PLATFORMS = ("manylinux2014_aarch64", *(f"manylinux_2_{n}_aarch64" for n in range(17, 37)))
CPU = "cortex-a76"  # of a Raspberry Pi 5
SSHD_CONFIG = f"""
Port {{port}}
HostKey /etc/ssh/board_ed25519
UsePAM no
PasswordAuthentication no
MaxStartups 100
# sshd gives sessions a new environment, and qemu-user would emulate another processor in them.
SetEnv QEMU_CPU={CPU}
"""


def bootstrap() -> Path:
    """Return the packed userland, made the first time."""
    command: list[str | Path] = [
        "mmdebstrap", "--architectures=arm64", "--variant=extract", "--format=tar",
        f"--hook-dir={MERGED_USR}", f"--include={','.join(PACKAGES)}",
        *(f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT),
        *(f"--extract-hook={line}" for line in CONFIGURE), SUITE,
    ]  # fmt: skip
    return keep("rootfs", command, lambda path: run_quietly([*command, path]))


def unpack_rootfs(folder: Path) -> None:
    """Write the userland into a new folder."""
    packed = bootstrap()
    folder.mkdir(parents=True)
    run_quietly(["tar", "-x", "-p", "--numeric-owner", "-C", folder, "-f", packed])


def open_door(root: Path, keys: Path, port: int) -> None:
    """Make the key pairs in folder `keys`; the userland's sshd takes them, on `port`."""
    keys.mkdir(exist_ok=True)
    for name in ("host_ed25519", "id_ed25519"):
        make_key(keys / name, "ed25519")
    shutil.copy(keys / "host_ed25519", root / "etc/ssh/board_ed25519")
    (root / "etc/ssh/board_ed25519").chmod(0o600)
    (root / "etc/ssh/sshd_config").write_text(SSHD_CONFIG.format(port=port), encoding="ascii")
    allowed = root / "home" / USER / ".ssh" / "authorized_keys"
    allowed.parent.mkdir(mode=0o700)
    shutil.copy(keys / "id_ed25519.pub", allowed)
    for path in (allowed.parent, allowed):
        shutil.chown(path, USER_ID, USER_ID)
    (root / "run/sshd").mkdir(exist_ok=True)


def name_runtimes(names: Sequence[str]) -> list[str]:
    """Return runtimes as pip requires them, of the versions that are installed here."""
    return [f"{name}=={version(name)}" for name in names]


def install_runtimes(root: Path, requirements: Sequence[str]) -> None:
    """Put wheels for the board into a virtual environment below `root`, without emulating pip."""
    run_quietly(["chroot", root, "python3", "-m", "venv", "--without-pip", f"/{RUNTIME}"])
    target = root / RUNTIME / "lib" / f"python{DEVICE_PYTHON}" / "site-packages"
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target), "--no-compile",
        "--only-binary=:all:", "--implementation", "cp", "--python-version", DEVICE_PYTHON,
    ]  # fmt: skip
    for platform in PLATFORMS:
        command += ["--platform", platform]
    run_quietly([*command, *requirements])


if __name__ == "__main__":
    bootstrap()
