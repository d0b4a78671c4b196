"""A real OpenSSH server on a loopback port, for one test or for all."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from toolkit.device import Device

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 30
CONFIG = """
Port {port}
ListenAddress 127.0.0.1
{host_keys}
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowTcpForwarding yes
MaxStartups 100
LogLevel VERBOSE
Subsystem sftp internal-sftp
"""


@dataclass
class OpenSSH:
    """A running sshd; `folder` holds its keys, its log and the user's key pair."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    def device(self, root: Path, **changes: object) -> Device:
        """Return the device to log in to, without a pinned host key."""
        fields = {
            "name": "board",
            "host": LOOPBACK,
            "port": self.port,
            "user": getpass.getuser(),
            "identity_file": str(self.folder / "id_ed25519"),
            "python": sys.executable,
            "root": str(root),
            "runtime": "device",
        }
        return Device(**{**fields, **changes})

    def public_key(self, kind: str = "ed25519") -> str:
        """Return `type base64` of a host key."""
        text = (self.folder / f"host_{kind}.pub").read_text()
        return " ".join(text.split()[:2])

    def fingerprint(self, kind: str = "ed25519") -> str:
        """Return what ssh-keygen itself says of a host key."""
        path = str(self.folder / f"host_{kind}.pub")
        done = subprocess.run(["ssh-keygen", "-lf", path], capture_output=True, check=True)
        return done.stdout.decode().split()[1]

    def stop(self) -> None:
        """End the server; sessions that are open go on."""
        self.process.terminate()
        self.process.wait(START_TIMEOUT_S)


def find_sshd() -> str:
    """Return the path of sshd; without one skip, but fail where CI must have it."""
    path = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs sshd: apt-get install openssh-server")
        pytest.skip("no sshd on this machine")
    return path


def start_sshd(
    folder: Path, kinds: tuple[str, ...] = ("ed25519",), port: int = 0, more: str = ""
) -> OpenSSH:
    """Start sshd with fresh keys; `kinds` are those of its host keys, `more` lines of settings."""
    sshd = find_sshd()
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        make_key(folder / f"host_{kind}", kind)
    make_key(folder / "id_ed25519", "ed25519")
    shutil.copy(folder / "id_ed25519.pub", folder / "authorized_keys")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd of root insists on it
    port = port or find_free_port()
    host_keys = "\n".join(f"HostKey {folder}/host_{kind}" for kind in kinds)
    config = folder / "sshd_config"
    config.write_text(CONFIG.format(port=port, host_keys=host_keys, folder=folder) + more)
    log = folder / "sshd.log"
    process = subprocess.Popen([sshd, "-D", "-f", str(config), "-E", str(log)])
    _wait_for_banner(port, process, log)
    return OpenSSH(folder, port, process)


def make_key(path: Path, kind: str, passphrase: str = "") -> None:
    """Make a key pair unless it is there."""
    if not path.exists():
        command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-f", str(path)]
        subprocess.run(command, check=True)


def find_free_port() -> int:
    """Return a port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _wait_for_banner(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up_s and process.poll() is None:
        try:
            with socket.create_connection((LOOPBACK, port), timeout=5) as link:
                if link.recv(4) == b"SSH-":
                    return
        except OSError:
            time.sleep(0.05)
    pytest.fail(f"sshd did not start: {log.read_text() if log.exists() else 'no log'}")
