"""What tests of emulated boards share: a home of their own."""

from pathlib import Path

import pytest

from tests.cache import FOLDER
from toolkit.console import Console


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests away from the user's own settings, known hosts and agent."""
    config = tmp_path / "ssh_config"
    config.write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("PHISHIP_SSH_CONFIG", str(config))
    # The cache stays the user's: wheels for the board need no network then.
    monkeypatch.setenv("XDG_CACHE_HOME", str(FOLDER.parent.parent))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@pytest.fixture
def console() -> Console:
    return Console(as_json=True)
