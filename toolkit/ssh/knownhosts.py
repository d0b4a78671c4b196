"""Known hosts: known keys pass; unknown, changed and revoked ones are refused, never added.

Reads the format of OpenSSH's known_hosts (sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT"). Its lines are
parsed here, because paramiko's reader gives up a whole file at the first marker it cannot read.
"""

import base64
import binascii
import fnmatch
import hashlib
import hmac
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.device import config_folder
from toolkit.errors import HostKeyError

REVOKED = "@revoked"


@dataclass(frozen=True)
class HostKey:
    """A public host key: its type and its bytes in SSH's wire format."""

    kind: str
    blob: bytes

    @property
    def fingerprint(self) -> str:
        """SHA256:... as ssh-keygen -l prints it."""
        digest = hashlib.sha256(self.blob).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    @property
    def text(self) -> str:
        """`type base64`, as known_hosts has it."""
        return f"{self.kind} {base64.b64encode(self.blob).decode()}"


@dataclass(frozen=True)
class KnownKey:
    """One line of a known_hosts file that names the host; `key` is None when it cannot be read."""

    path: Path
    line: int
    is_revoked: bool
    key: HostKey | None

    @property
    def place(self) -> str:
        """file:line, for people."""
        return f"{self.path}:{self.line}"


def own_file() -> Path:
    """Return phiship's own known_hosts, the only one it ever writes."""
    return config_folder() / "known_hosts"


def list_files() -> tuple[Path, ...]:
    """Return the files that are read: phiship's own, the user's and the system's."""
    return own_file(), Path.home() / ".ssh" / "known_hosts", Path("/etc/ssh/ssh_known_hosts")


def find_known_keys(host: str, port: int, files: Iterable[Path]) -> list[KnownKey]:
    """Return every line of `files` that speaks of host and port, revoked ones included."""
    names = (host, f"[{host}]:{port}") if port == 22 else (f"[{host}]:{port}",)
    return [known for path in files for known in _read_file(path, names)]


def check_host_key(
    device: str, key: HostKey, known: Sequence[KnownKey], pinned: str | None
) -> None:
    """Return when `key` is the pinned or a known one; HostKeyError otherwise."""
    refuse_revoked(device, key, known)
    if pinned is not None:
        _check_pinned(device, key, pinned)
    elif not is_known(device, key, known):
        raise HostKeyError(
            f"{device}: its host key is unknown: {key.kind} {key.fingerprint}",
            advice="compare it with what `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` says "
            f"on the device, then: phiship trust {device} --fingerprint {key.fingerprint}",
        )


def list_trusted(known: Sequence[KnownKey], pinned: str | None) -> list[HostKey]:
    """Return the keys a device may show; none when a line revokes something unreadable.

    With a pinned fingerprint only the known key that has it.
    """
    revoked = [entry.key for entry in known if entry.is_revoked]
    if None in revoked:
        return []
    keys = [entry.key for entry in known if entry.key and not entry.is_revoked]
    return [key for key in keys if key not in revoked and pinned in (None, key.fingerprint)]


def refuse_revoked(device: str, key: HostKey, known: Iterable[KnownKey]) -> None:
    """Raise HostKeyError when a line revokes the key, or revokes something unreadable."""
    for entry in known:
        if entry.is_revoked and entry.key in (key, None):
            raise HostKeyError(
                f"{device}: its host key {key.kind} {key.fingerprint} is marked as revoked in "
                f"{entry.place}",
                advice="do not connect; ask whoever runs the device for its new key",
            )


def is_known(device: str, key: HostKey, known: Iterable[KnownKey]) -> bool:
    """Say whether the key is known; HostKeyError when the device is known by another key."""
    trusted = [entry for entry in known if not entry.is_revoked]
    if trusted and all(entry.key != key for entry in trusted):
        raise _changed(device, key, trusted)
    return bool(trusted)


def add_known_key(path: Path, host: str, port: int, key: HostKey) -> None:
    """Append a key to a known_hosts file, which is made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    name = host if port == 22 else f"[{host}]:{port}"
    line = f"{name} {key.text}\n"
    before = path.read_bytes()[-1:] if path.exists() else b""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        # A last line without its end would swallow the new one.
        stream.write((b"" if before in (b"", b"\n") else b"\n") + line.encode())
        stream.flush()
        os.fsync(stream.fileno())


def _check_pinned(device: str, key: HostKey, pinned: str) -> None:
    if not hmac.compare_digest(key.fingerprint, pinned):
        raise HostKeyError(
            f"{device}: its host key is {key.kind} {key.fingerprint}; host_key in the devices file "
            f"says {pinned}",
            advice="when the device was set up anew, correct host_key; otherwise do not connect",
        )


def _changed(device: str, key: HostKey, trusted: Sequence[KnownKey]) -> HostKeyError:
    old = next((entry for entry in trusted if entry.key and entry.key.kind == key.kind), trusted[0])
    old_key = f"{old.key.kind} {old.key.fingerprint}" if old.key else "unreadable"
    return HostKeyError(
        f"{device}: its host key has CHANGED: it is now {key.kind} {key.fingerprint}; "
        f"{old.place} holds {old_key}",
        advice="someone may be in between; when the device was set up anew, remove that line and "
        "try again",
    )


def _read_file(path: Path, names: Sequence[str]) -> Iterator[KnownKey]:
    """Yield the lines of one file that match one of `names`; lines nobody can read are skipped."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for number, text in enumerate(lines, 1):
        fields = text.split()
        marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
        if not fields or fields[0].startswith("#") or marker not in ("", REVOKED):
            continue
        if any(_match_hosts(fields[0], name) for name in names):
            known = KnownKey(path, number, marker == REVOKED, _read_key(fields[1:3]))
            # Unreadable trust is no trust; an unreadable revocation may mean any key.
            if known.key or known.is_revoked:
                yield known


def _read_key(fields: Sequence[str]) -> HostKey | None:
    """Decode key type and base64; None when they are damaged or contradict each other."""
    if len(fields) != 2:
        return None
    try:
        blob = base64.b64decode(fields[1], validate=True)
    except (binascii.Error, ValueError):
        return None
    kind = fields[0].encode()
    return HostKey(fields[0], blob) if blob[4 : 4 + len(kind)] == kind else None


def _match_hosts(field: str, name: str) -> bool:
    """Match the first field of a line: a hash, or patterns of which a negated one wins."""
    if field.startswith("|"):
        return _match_hash(field, name)
    found = False
    for pattern in field.lower().split(","):
        if _match_pattern(pattern.removeprefix("!"), name.lower()):
            if pattern.startswith("!"):
                return False
            found = True
    return found


def _match_hash(field: str, name: str) -> bool:
    """Match |1|salt|hash, the HMAC-SHA1 that HashKnownHosts writes."""
    parts = field.split("|")
    if len(parts) != 4 or parts[1] != "1":
        return False
    try:
        salt, expected = base64.b64decode(parts[2]), base64.b64decode(parts[3])
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(hmac.new(salt, name.encode(), hashlib.sha1).digest(), expected)


def _match_pattern(pattern: str, name: str) -> bool:
    """Match * and ? as OpenSSH does; brackets stand for themselves, as in [host]:port."""
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))
