"""Servers that keep recorded contracts, and artifacts to give them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.exports.ollama_server import OllamaServer
from toolkit.console import Console


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


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests away from the user's own settings, known hosts and agent."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("SSH_AUTH_SOCK", "PHISHIP_DEVICES", "PHISHIP_EMBEDDED_ROOT"):
        monkeypatch.delenv(name, raising=False)
