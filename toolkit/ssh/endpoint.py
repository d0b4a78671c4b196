"""Where a connection really goes: OpenSSH's own settings, asked of `ssh -G` where it is there."""

import getpass
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from toolkit.device import EMBEDDED, Device
from toolkit.errors import UnreachableError

CONFIG_VARIABLE = "PHISHIP_SSH_CONFIG"
RESOLVE_TIMEOUT_S = 20
DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")


@dataclass(frozen=True)
class Endpoint:
    """One SSH server: address, user, keys, and the servers in between, nearest first."""

    host: str
    port: int
    user: str
    identity_files: tuple[Path, ...]
    use_agent: bool
    jumps: tuple[str, ...]


def resolve_endpoint(device: Device) -> Endpoint:
    """Return where `device` is; what it says itself wins over ssh's settings."""
    settings: dict[str, list[str]] = {}
    if device.name != EMBEDDED:
        settings = _ask_ssh(device)
    if settings.get("proxycommand", ["none"]) != ["none"]:
        raise UnreachableError(
            f"{device.name}: ssh's settings use ProxyCommand, which is not supported",
            advice="use ProxyJump in ~/.ssh/config",
        )
    return Endpoint(
        host=settings.get("hostname", [device.host])[0],
        port=int(settings.get("port", [str(device.port)])[0]),
        user=device.user or settings.get("user", [getpass.getuser()])[0],
        identity_files=_list_keys(device, settings),
        use_agent=device.identity_file is None,
        jumps=_read_jumps(settings.get("proxyjump", ["none"])[0]),
    )


def build_ssh(device: Device) -> list[str]:
    """Return ssh with what the device says of its address, all but the host."""
    # Port 22 is what nobody said: then ssh's settings may say another.
    port = [] if device.port == 22 else ["-p", str(device.port)]
    user = ["-l", device.user] if device.user else []
    config = os.environ.get(CONFIG_VARIABLE)
    return ["ssh", *(["-F", config] if config else []), *port, *user]


def build_query(device: Device) -> list[str]:
    """Return the command that asks OpenSSH how it would reach the device."""
    return [*build_ssh(device), "-G", "--", device.host]


def parse_settings(text: str) -> dict[str, list[str]]:
    """Read the `key value` lines of `ssh -G`; a key may come more than once."""
    settings: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        settings.setdefault(key, []).append(value)
    return settings


def _ask_ssh(device: Device) -> dict[str, list[str]]:
    if shutil.which("ssh") is None:
        return {}
    try:
        done = subprocess.run(
            build_query(device),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=RESOLVE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UnreachableError(
            f"{device.name}: `ssh -G` did not answer within {RESOLVE_TIMEOUT_S} s",
            advice="look for a Match exec in ~/.ssh/config that hangs",
        ) from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnreachableError(
            f"{device.name}: ssh cannot read its settings: {last}", advice="correct ~/.ssh/config"
        )
    return parse_settings(done.stdout)


def _list_keys(device: Device, settings: dict[str, list[str]]) -> tuple[Path, ...]:
    """Return the keys to offer: the device's own alone, else those of ssh that exist."""
    if device.identity_file:
        return (Path(device.identity_file).expanduser(),)
    names = settings.get("identityfile", [f"~/.ssh/{name}" for name in DEFAULT_KEYS])
    paths = (Path(name).expanduser() for name in names)
    return tuple(path for path in paths if path.is_file())


def _read_jumps(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.removeprefix("ssh://").split(","))
