"""Logging in to an emulated board."""

import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.deploy.sshd import LOOPBACK
from tests.emulated.rootfs import USER
from toolkit.device import Device

COMMAND_TIMEOUT_S = 120


def describe_board(port: int, keys: Path, python: str) -> Device:
    """Return the device behind a port, with its host key pinned."""
    told = subprocess.run(
        ["ssh-keygen", "-lf", str(keys / "host_ed25519.pub")], capture_output=True, check=True
    )
    return Device(
        name="pi5",
        host=LOOPBACK,
        port=port,
        user=USER,
        identity_file=str(keys / "id_ed25519"),
        host_key=told.stdout.decode().split()[1],
        python=python,
    )


def run_there(device: Device, keys: Path, command: str) -> str:
    """Run a shell command on a board through ssh, with nothing of phiship; returns its output."""
    known = f"[{device.host}]:{device.port} {(keys / 'host_ed25519.pub').read_text('ascii')}"
    with tempfile.NamedTemporaryFile("w") as known_hosts:
        known_hosts.write(known)
        known_hosts.flush()
        done = subprocess.run(
            [
                "ssh", "-F", "none", "-i", str(device.identity_file), "-p", str(device.port),
                "-o", "BatchMode=yes", "-o", f"UserKnownHostsFile={known_hosts.name}",
                f"{device.user}@{device.host}", command,
            ],
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command!r} on the board: {done.returncode}\n{done.stderr}")
    return done.stdout


def wait_for_ssh(port: int, is_alive: Callable[[], bool], timeout_s: float) -> None:
    """Return when a server greets; TimeoutError when it has not, or its process has ended."""
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s and is_alive():
        try:
            with socket.create_connection((LOOPBACK, port), timeout=5) as link:
                if link.recv(4) == b"SSH-":
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise TimeoutError(f"no SSH server on port {port} within {timeout_s} s")
