"""A hub on the loopback with one repository, and an empty cache."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.checkpoint.hub_cases import COMMIT, ID, OLD_COMMIT
from tests.checkpoint.hub_server import Hub, Repository, serve
from tests.checkpoints import write_random_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint, with files beside it that must never be fetched."""
    folder = write_random_checkpoint(tmp_path_factory.mktemp("source") / "new", "gqa", shards=2)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_phi3.py").write_text("raise SystemExit('remote code ran')")
    (folder / "README.md").write_text("a model card")
    return folder


@pytest.fixture(scope="module")
def old_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same repository at another commit."""
    return write_random_checkpoint(tmp_path_factory.mktemp("source") / "old", "mha", seed=1)


@pytest.fixture
def hub(
    source: Path, old_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """A running hub that this process' huggingface_hub talks to."""
    with serve() as hub:
        hub.repositories[ID] = Repository(
            {COMMIT: source, OLD_COMMIT: old_source}, {"main": COMMIT, "v1": OLD_COMMIT}
        )
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        huggingface_hub.close_session()
        yield hub
    huggingface_hub.close_session()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty cache."""
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"
