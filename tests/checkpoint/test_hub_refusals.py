"""What a hub refuses, or nobody answers: a sentence with a next step, or the copy that is there."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.checkpoint.hub_cases import (
    COMMIT,
    ID,
    OLD_COMMIT,
    QUIET,
    SECOND,
    TOKEN,
    assert_same,
    refusal,
)
from tests.checkpoint.hub_server import Hub, Repository
from toolkit.checkpoint.hub import is_local, resolve
from toolkit.console import Console
from toolkit.errors import CheckpointError


def test_missing_repository(hub: Hub, cache: Path) -> None:
    message = refusal("someone/else", cache)
    assert "someone/else: no such folder here, and no such repository at 127.0.0.1" in message


def test_missing_revision(hub: Hub, cache: Path) -> None:
    assert f"{ID}: no revision 'v9'" in refusal(f"{ID}@v9", cache)
    assert "no revision" in refusal(f"{ID}@{'c' * 40}", cache)


@pytest.mark.parametrize("token", ["", TOKEN])
def test_gated_repository(
    hub: Hub, cache: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    hub.repositories[ID].gated = True
    message = refusal(ID, cache)
    assert "gated" in message and "hf auth login" in message
    assert TOKEN not in message


@pytest.mark.parametrize(("status", "says"), [(403, "hf auth login"), (429, "wait"), (418, "418")])
def test_other_answers_are_explained_without_the_token(
    hub: Hub, cache: Path, status: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fails_with = status
    message = refusal(ID, cache)
    assert str(status) in message and says in message
    assert TOKEN not in message


def test_token_is_not_sent_to_the_cdn(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    resolve(ID, QUIET, cache=cache)
    assert hub.cdn_authorizations and set(hub.cdn_authorizations) == {""}


@pytest.mark.parametrize("status", [0, 503])
def test_offline_uses_what_is_there(
    hub: Hub,
    cache: Path,
    source: Path,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    resolve(ID, QUIET, cache=cache)
    _disconnect(hub, status, monkeypatch)
    for reference in (ID, f"{ID}@{COMMIT}"):
        checkpoint = resolve(reference, Console(), cache=cache)
        assert checkpoint.revision == COMMIT
        assert_same(checkpoint, source)
    assert "cannot be reached; going on" in " ".join(capsys.readouterr().err.split())


def test_offline_by_request(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(ID, QUIET, cache=cache)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(ID, QUIET, cache=cache).revision == COMMIT
    assert len(hub.requests) == asked


def test_offline_without_a_copy(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _disconnect(hub, 0, monkeypatch)
    message = refusal(ID, cache)
    assert "cannot be reached (ConnectError)" in message and "no complete copy" in message


def test_offline_with_half_a_copy(
    hub: Hub, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.corrupts = SECOND
    refusal(ID, cache)
    _disconnect(hub, 0, monkeypatch)
    for reference in (ID, f"{ID}@{COMMIT}"):
        assert "no complete copy" in refusal(reference, cache)


def test_offline_main_is_the_last_complete_one(
    hub: Hub, cache: Path, old_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[ID].names["main"] = OLD_COMMIT
    resolve(ID, QUIET, cache=cache)
    hub.repositories[ID].names["main"] = COMMIT
    hub.corrupts = SECOND
    refusal(ID, cache)
    _disconnect(hub, 0, monkeypatch)
    assert resolve(ID, QUIET, cache=cache).revision == OLD_COMMIT


def _disconnect(hub: Hub, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub answer with `status`; 0 means that nobody listens there."""
    hub.fails_with = status
    if not status:
        # Port 9 (discard) of the loopback: refused at once where nobody serves it.
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def test_no_safetensors_is_refused_before_any_download(
    hub: Hub, cache: Path, tmp_path: Path, source: Path
) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    hub.repositories[ID] = Repository({COMMIT: folder}, {"main": COMMIT})
    message = refusal(ID, cache)
    assert "has no model.safetensors" in message and ".bin" in message
    assert not hub.sent_bytes


def test_answer_that_is_not_a_hubs(hub: Hub, cache: Path, source: Path) -> None:
    hub.repositories[ID].commits["not-a-commit"] = source
    hub.repositories[ID].names["main"] = "not-a-commit"
    assert "HF_ENDPOINT" in refusal(ID, cache)


@pytest.mark.parametrize("reference", ["a/b/c", "name", "a/b@", "a/b@x/../../y", "a b/c", ""])
def test_neither_folder_nor_id(reference: str, cache: Path) -> None:
    assert "owner/name@revision" in refusal(reference, cache)


def test_local_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(source), QUIET).revision == "local"
    monkeypatch.chdir(source.parent.parent)
    relative = f"{source.parent.name}/{source.name}"
    assert is_local(relative) and resolve(relative, QUIET).folder == Path(relative)
    monkeypatch.setenv("HOME", str(source.parent))
    assert resolve(f"~/{source.name}", QUIET).folder == source
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve("./someone/missing", QUIET)
