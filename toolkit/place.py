"""Where an artifact runs: in a folder on this machine, or as the release in use on a device."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from toolkit.artifact import Manifest, read_manifest
from toolkit.device import Device, resolve_device
from toolkit.endpoint import Endpoint
from toolkit.errors import RunnerError
from toolkit.remote import read_remote_manifest, read_service
from toolkit.runner.agent import child
from toolkit.runner.agent.server import open_server
from toolkit.runner.failure import Failure
from toolkit.smoke import CURRENT, read_answer, run_there
from toolkit.ssh.embedded import running
from toolkit.ssh.session import Session, TakeProgress, open_session
from toolkit.ssh.tunnel import LOOPBACK, tunneling

ANSWER_TIMEOUT_S = 3600.0


class Place(Protocol):
    """An artifact with the machine that runs it."""

    name: str
    manifest: Manifest

    def run(
        self,
        arguments: Sequence[str],
        stdin: str = "",
        *,
        timeout_s: float = ANSWER_TIMEOUT_S,
        take_progress: TakeProgress | None = None,
    ) -> dict[str, Any]:
        """Run the runner there; returns the JSON of its last line. RunnerError when it fails."""

    def serving(
        self, arguments: Sequence[str] = (), *, local_port: int = 0
    ) -> AbstractContextManager[Endpoint]:
        """Serve it for the length of a block, on a port of this machine's loopback."""


class LocalPlace:
    """An artifact's folder on this machine."""

    def __init__(self, artifact: Path) -> None:
        self.artifact = artifact
        self.name = artifact.name
        self.manifest = read_manifest(artifact)

    def run(
        self,
        arguments: Sequence[str],
        stdin: str = "",
        *,
        timeout_s: float = ANSWER_TIMEOUT_S,
        take_progress: TakeProgress | None = None,
    ) -> dict[str, Any]:
        """As Place."""

        def take_line(line: bytes) -> None:
            told = child.read_progress(line)
            if told is not None and take_progress:
                take_progress(told)

        command = build_command(self.artifact, arguments)
        done = child.run_child(command, stdin.encode(), timeout_s, take_line)
        return read_answer(self.name, child.add_answer(done))

    @contextmanager
    def serving(self, arguments: Sequence[str] = (), *, local_port: int = 0) -> Iterator[Endpoint]:
        """As Place."""
        with explain_failure(self.name):
            command = ["serve", "--port", str(local_port), *arguments]
            server = open_server(build_command(self.artifact, command))
        try:
            yield Endpoint(f"{server.told['listening']}/v1", self.manifest.name)
        finally:
            server.close()


class RemotePlace:
    """The release in use on a device, through a session that is open."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.name = session.device.name
        self.manifest = read_remote_manifest(session, CURRENT)

    def run(
        self,
        arguments: Sequence[str],
        stdin: str = "",
        *,
        timeout_s: float = ANSWER_TIMEOUT_S,
        take_progress: TakeProgress | None = None,
    ) -> dict[str, Any]:
        """As Place."""
        return run_there(self._session, CURRENT, arguments, stdin, timeout_s, take_progress)

    @contextmanager
    def serving(self, arguments: Sequence[str] = (), *, local_port: int = 0) -> Iterator[Endpoint]:
        """As Place; the device's own service when that does, for memory may hold one model only."""
        service = read_service(self._session)
        if service.active and not arguments and not service.has_token:
            host, remote_port = service.address, service.port
        else:
            command = ["--port", "0", *arguments]
            told = self._session.call("serve", release=CURRENT, arguments=command)
            host, remote_port = LOOPBACK, told["port"]
        with tunneling(self._session.device, remote_port, local_port, host) as port:
            yield Endpoint(f"http://{LOOPBACK}:{port}/v1", self.manifest.name)


@contextmanager
def open_place(text: str, devices_file: Path | None = None) -> Iterator[Place]:
    """Yield the place a text names: an artifact's folder, else a device.

    Raises ArtifactError, or what `open_session` raises.
    """
    folder = Path(text)
    if folder.is_dir() or "/" in text:
        yield LocalPlace(folder)
        return
    with open_device(resolve_device(text, devices_file)) as place:
        yield place


@contextmanager
def open_device(device: Device) -> Iterator[RemotePlace]:
    """Yield the release in use on a device."""
    with running(device) as started, open_session(started) as session:
        yield RemotePlace(session)


def build_command(artifact: Path, arguments: Sequence[str]) -> list[str]:
    """Return the command that runs this machine's runner, the same one that devices get."""
    first, *rest = arguments
    return [sys.executable, "-m", "toolkit.runner", first, "--artifact", str(artifact), *rest]


@contextmanager
def explain_failure(name: str) -> Iterator[None]:
    """Turn what a runner says of its failure into our own error."""
    try:
        yield
    except Failure as failure:
        raise RunnerError(f"{name}: {failure}", advice=failure.advice) from failure
