"""Devices to push to: the embedded one and a real OpenSSH server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.sshd import OpenSSH, start_sshd
from toolkit.console import Console
from toolkit.device import Device


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the tests away from the user's own settings, known hosts and agent."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / ".config"))
    config = home / "ssh_config"
    config.write_text("")
    monkeypatch.setenv("PHISHIP_SSH_CONFIG", str(config))
    for name in ("SSH_AUTH_SOCK", "PHISHIP_DEVICES", "PHISHIP_EMBEDDED_ROOT"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture(scope="session")
def openssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenSSH]:
    server = start_sshd(tmp_path_factory.mktemp("sshd"))
    yield server
    server.stop()


@pytest.fixture(params=["embedded", "openssh"])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Device:
    """Any device must pass; one of each kind."""
    if request.param == "embedded":
        started: Device = request.getfixturevalue("start_embedded")().start()
        return started
    server: OpenSSH = request.getfixturevalue("openssh")
    return server.device(tmp_path / "device", host_key=server.fingerprint())


@pytest.fixture
def console() -> Console:
    return Console(as_json=True)
