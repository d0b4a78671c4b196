"""Downloading from a hub: whole, resumed, refused, offline; against a hub on the loopback."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.checkpoint import hub_server
from tests.checkpoint.hub_server import Hub, Repository, serve
from tests.checkpoints import write_random_checkpoint
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.config import Config
from toolkit.checkpoint.download import ATTEMPTS_WITHOUT_PROGRESS
from toolkit.checkpoint.hub import is_local, resolve
from toolkit.console import Console
from toolkit.errors import CheckpointError, UnsupportedError

ID = "someone/Phi-3-random"
COMMIT = "a" * 40
OLD_COMMIT = "b" * 40
TOKEN = "hf_SECRETsecretSECRETsecret"
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
CUT_BYTES = 300_000
QUIET = Console(as_json=True)


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


def blobs(cache: Path) -> Path:
    return cache / "models--someone--Phi-3-random" / "blobs"


def partial(cache: Path, file: Path) -> Path:
    return blobs(cache) / f"{hashlib.sha256(file.read_bytes()).hexdigest()}.incomplete"


def refusal(reference: str, cache: Path) -> str:
    """The message and the advice of the CheckpointError that `reference` leads to."""
    with pytest.raises(CheckpointError) as caught:
        resolve(reference, QUIET, cache=cache)
    return f"{caught.value} | {caught.value.advice}"


def assert_same(checkpoint: Checkpoint, source: Path) -> None:
    """Every file of the downloaded folder is the source's, byte for byte."""
    names = {path.name for path in checkpoint.folder.iterdir()}
    assert {"config.json", "generation_config.json"} < names
    for name in names:
        assert (checkpoint.folder / name).read_bytes() == (source / name).read_bytes(), name


def test_download_equals_the_source(hub: Hub, cache: Path, source: Path) -> None:
    checkpoint = resolve(f"{ID}@{COMMIT}", QUIET, cache=cache)
    assert checkpoint.revision == COMMIT
    assert set(checkpoint.tensors) == set(Checkpoint.open(source).tensors)
    assert checkpoint.fingerprint() == Checkpoint.open(source).fingerprint()
    assert_same(checkpoint, source)


def test_only_what_is_needed_is_fetched(hub: Hub, cache: Path, source: Path) -> None:
    resolve(ID, QUIET, cache=cache)
    assert {FIRST, SECOND, "config.json", "model.safetensors.index.json"} <= hub.fetched()
    assert not {"pytorch_model.bin", "modeling_phi3.py", "README.md"} & hub.fetched()
    tokenizer = {path.name for path in source.iterdir()} & {"tokenizer.json", "tokenizer.model"}
    assert tokenizer <= hub.fetched()


def test_weights_kept_as_small_files(
    hub: Hub, cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as large files with a sha256: huggingface_hub fetches them whole."""
    monkeypatch.setattr(hub_server, "LARGE_SUFFIXES", ())
    assert_same(resolve(ID, QUIET, cache=cache), source)


def test_second_time_nothing_is_fetched(hub: Hub, cache: Path) -> None:
    resolve(ID, QUIET, cache=cache)
    sent_bytes = hub.sent_bytes.total()
    again = resolve(ID, QUIET, cache=cache)
    assert again.revision == COMMIT
    assert hub.sent_bytes.total() == sent_bytes


def test_unpinned_says_its_commit(
    hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolve(ID, Console(), cache=cache).revision == COMMIT
    told = "".join(capsys.readouterr().err.split())
    assert f"mainis{COMMIT}now;topinit:{ID}@{COMMIT}" in told


def test_pinned_says_nothing(hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resolve(f"{ID}@{COMMIT}", Console(), cache=cache)
    assert "pin" not in capsys.readouterr().err


def test_revisions_are_kept_apart(hub: Hub, cache: Path, source: Path, old_source: Path) -> None:
    assert_same(resolve(f"{ID}@v1", QUIET, cache=cache), old_source)
    assert_same(resolve(ID, QUIET, cache=cache), source)
    assert resolve(f"{ID}@{OLD_COMMIT}", QUIET, cache=cache).revision == OLD_COMMIT


def test_progress_counts_every_byte_of_the_weights(
    hub: Hub, cache: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve(ID, Console(as_json=True), cache=cache)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[0] == {"event": "resolved", "repository": ID, "revision": COMMIT}
    last = [event for event in events if event["event"] == "progress"][-1]
    weights_bytes = sum((source / name).stat().st_size for name in (FIRST, SECOND))
    assert last["done_bytes"] == last["total_bytes"] == weights_bytes


@pytest.mark.parametrize("times", [1, ATTEMPTS_WITHOUT_PROGRESS + 1])
def test_cut_connection_is_mended_and_sends_only_the_rest(
    hub: Hub, cache: Path, source: Path, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each cut comes after progress, so any number of them must be survived; no need to wait here.
    monkeypatch.setattr("threading.Event.wait", lambda *_: False)
    _cut_repeatedly(hub, monkeypatch, times)
    assert_same(resolve(ID, QUIET, cache=cache), source)
    assert hub.sent_bytes[FIRST] == (source / FIRST).stat().st_size


def _cut_repeatedly(hub: Hub, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Let the next `times` connections for FIRST end early."""
    left = [CUT_BYTES // times] * times

    class Cuts(dict[str, int]):
        def pop(self, name: str, default: object = None) -> object:  # type: ignore[override]
            return left.pop() if name == FIRST and left else default

    hub.cut_after = Cuts()


def test_failed_download_resumes_where_it_ended(hub: Hub, cache: Path, source: Path) -> None:
    hub.cut_after[FIRST] = CUT_BYTES
    hub.corrupts = SECOND
    assert SECOND in refusal(ID, cache)
    left = partial(cache, source / FIRST)
    had_bytes = left.stat().st_size if left.exists() else (source / FIRST).stat().st_size
    assert had_bytes >= CUT_BYTES
    hub.corrupts = ""
    hub.sent_bytes.clear()
    assert_same(resolve(ID, QUIET, cache=cache), source)
    assert hub.sent_bytes[FIRST] == (source / FIRST).stat().st_size - had_bytes
    assert hub.sent_bytes[SECOND] == (source / SECOND).stat().st_size


def test_server_without_ranges_starts_anew(
    hub: Hub, cache: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blobs(cache).mkdir(parents=True)
    partial(cache, source / FIRST).write_bytes(b"x" * 1000)
    hub.ignores_ranges = True
    assert_same(resolve(ID, QUIET, cache=cache), source)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["done_bytes"] == last["total_bytes"]


def test_wrong_content_is_removed(hub: Hub, cache: Path, source: Path) -> None:
    hub.corrupts = FIRST
    assert "has another sha256" in refusal(ID, cache)
    assert not partial(cache, source / FIRST).exists()
    assert not list(cache.rglob(FIRST))


def test_damaged_rest_is_noticed(hub: Hub, cache: Path, source: Path) -> None:
    blobs(cache).mkdir(parents=True)
    partial(cache, source / FIRST).write_bytes(b"x" * CUT_BYTES)
    assert "has another sha256" in refusal(ID, cache)
    assert_same(resolve(ID, QUIET, cache=cache), source)


SCRIPT = """
import sys
from pathlib import Path
from toolkit.checkpoint.hub import resolve
from toolkit.console import Console
resolve(sys.argv[1], Console(as_json=True), cache=Path(sys.argv[2]))
"""


def start(hub: Hub, cache: Path, first: str = "") -> subprocess.Popen[str]:
    """Download in another process, which runs `first` and finds the hub by its environment."""
    hidden = ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache.parent / "home")}
    command = [sys.executable, "-c", first + SCRIPT, ID, str(cache)]
    # A shell in the background leaves SIGINT ignored; Ctrl-C at a terminal does not.
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_interrupt_ends_at_once_and_can_be_resumed(hub: Hub, cache: Path, source: Path) -> None:
    hub.stall_after[FIRST] = CUT_BYTES
    # Only the hub's two minutes could end the silence, not the client's patience.
    process = start(
        hub, cache, first="import toolkit.checkpoint.download as d\nd.READ_TIMEOUT_S = 300"
    )
    left = partial(cache, source / FIRST)
    deadline_s = time.monotonic() + 60
    while not (left.exists() and left.stat().st_size == CUT_BYTES):
        assert time.monotonic() < deadline_s and process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert not hub.release.is_set()
    assert "KeyboardInterrupt" in process.communicate()[1]
    hub.release.set()
    assert_same(resolve(ID, QUIET, cache=cache), source)
    assert hub.sent_bytes[FIRST] == (source / FIRST).stat().st_size


def test_killed_download_can_be_resumed(hub: Hub, cache: Path, source: Path) -> None:
    hub.stall_after[FIRST] = CUT_BYTES
    process = start(hub, cache)
    assert hub.stalled.wait(60)
    process.kill()
    process.communicate()
    hub.release.set()
    assert_same(resolve(ID, QUIET, cache=cache), source)
    # What the killed process had not yet written is sent again, at most the network's buffers.
    assert hub.sent_bytes[FIRST] <= (source / FIRST).stat().st_size + CUT_BYTES


def test_full_disk_before_the_download(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    message = refusal(ID, cache)
    assert "1 MB free" in message and "more" in message and "HF_HOME" in message
    assert not hub.sent_bytes[FIRST]


def test_full_disk_while_downloading(hub: Hub, cache: Path, source: Path) -> None:
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({CUT_BYTES},) * 2)"
    errors = start(hub, cache, first=limit).communicate()[1]
    assert "CheckpointError" in errors and "the disk is full" in errors
    assert_same(resolve(ID, QUIET, cache=cache), source)


def test_refused_config_ends_the_download_before_the_weights(hub: Hub, cache: Path) -> None:
    def accept(config: Config) -> None:
        raise UnsupportedError(f"not {config.architecture}")

    with pytest.raises(UnsupportedError, match="not Phi3ForCausalLM"):
        resolve(ID, QUIET, cache=cache, accept=accept)
    assert FIRST not in hub.fetched()


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
