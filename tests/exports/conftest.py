"""Servers that keep recorded contracts, and artifacts to give them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.exports.ollama_server import OllamaServer
from toolkit.console import Console
from toolkit.device import Device
from toolkit.ssh.embedded import EmbeddedDevice


@pytest.fixture
def console() -> Console:
    return Console(as_json=True)


@pytest.fixture
def ollama(tmp_path: Path) -> Iterator[OllamaServer]:
    """Ollama's contract; a test that breaks it fails."""
    server = OllamaServer(tmp_path / "ollama")
    yield server
    server.stop()
    assert server.state.violations == []


@pytest.fixture
def start_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., EmbeddedDevice]]:
    """Make embedded devices that are stopped at the end; the user's own settings do not count."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("SSH_AUTH_SOCK", "PHISHIP_DEVICES", "PHISHIP_EMBEDDED_ROOT"):
        monkeypatch.delenv(name, raising=False)
    made: list[EmbeddedDevice] = []

    def make(**options: object) -> EmbeddedDevice:
        made.append(EmbeddedDevice(tmp_path / "embedded", **options))
        return made[-1]

    yield make
    for device in made:
        device.stop()


@pytest.fixture
def board(start_embedded: Callable[..., EmbeddedDevice]) -> Device:
    return start_embedded().start()
