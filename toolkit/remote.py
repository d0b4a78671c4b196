"""Looking at a device, and small orders to it: everything but putting a release into use."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from toolkit.artifact import Manifest, Smoke
from toolkit.device import Device, Facts
from toolkit.smoke import CURRENT, Answer, ask
from toolkit.ssh.embedded import running
from toolkit.ssh.session import Session, open_session


class State(msgspec.Struct, frozen=True, kw_only=True):
    """The good release, to which a failure returns, and the one on trial."""

    good: str | None
    pending: str | None
    tries_left: int
    boot_id: str = ""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What is on a device."""

    root: str
    current: str | None
    previous: str | None
    state: State
    releases: tuple[str, ...]
    runtimes: tuple[str, ...]
    blobs: int
    blob_bytes: int
    incoming: tuple[str, ...]
    free_bytes: int


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """The service on a device that serves its release: systemd's or launchd's of its user.

    It listens on `host`, and is reached from the device itself at `address`.
    """

    installed: bool
    active: bool
    name: str = ""
    port: int = 0
    host: str = "127.0.0.1"
    address: str = "127.0.0.1"
    has_token: bool = False
    memory_bytes: int = 0


def probe(device: Device, engine: str = "") -> Facts:
    """Return a device's facts; with an engine's name, also whether it can be imported there."""
    with _session(device) as session:
        return read_facts(session, engine)


def read_facts(session: Session, engine: str = "", companions: Sequence[str] = ()) -> Facts:
    """As `probe`, in a session that is open; also which packages are there beside the engine."""
    answer = session.call("facts", engine=engine, companions=list(companions))
    return msgspec.convert(answer, Facts)


def read_service(session: Session) -> Service:
    """Return the state of a device's service."""
    return msgspec.convert(session.call("service"), Service)


def read_remote_manifest(session: Session, release: str) -> Manifest:
    """Return the manifest of a release; RunnerError when there is none."""
    return msgspec.convert(session.call("manifest", release=release)["manifest"], Manifest)


def read_status(device: Device) -> Status:
    """Return what is deployed on a device."""
    with _session(device) as session:
        return msgspec.convert(session.call("status"), Status)


def read_history(device: Device) -> list[dict[str, Any]]:
    """Return the device's journal, oldest first: time, boot_id, event, and more for each."""
    with _session(device) as session:
        events: list[dict[str, Any]] = session.call("history")["events"]
        return events


def read_logs(device: Device) -> str:
    """Return the end of what the device's runners wrote to stderr."""
    with _session(device) as session:
        return str(session.call("logs")["text"])


def unlock(device: Device, *, force: bool) -> dict[str, Any]:
    """Say who holds the device's lock (`holder`); with `force`, end that push (`unlocked`)."""
    with _session(device) as session:
        return session.call("unlock", force=force)


def uninstall(device: Device) -> str:
    """Remove everything phiship has put on a device; returns the folder that is gone."""
    with _session(device) as session:
        session.lock()
        return str(session.call("uninstall")["removed"])


def generate(device: Device, prompt: str, max_tokens: int = 256) -> Answer:
    """Ask the release in use a question; RunnerError when there is none or it fails."""
    with _session(device) as session:
        return ask(session, CURRENT, Smoke(prompt=prompt, expect="", max_tokens=max_tokens))


@contextmanager
def _session(device: Device) -> Iterator[Session]:
    with running(device) as started, open_session(started) as session:
        yield session
