"""Downloading from a hub: whole, resumed, interrupted; against a hub on the loopback."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.checkpoint import hub_server
from tests.checkpoint.hub_cases import (
    COMMIT,
    CUT_BYTES,
    FIRST,
    ID,
    OLD_COMMIT,
    QUIET,
    SECOND,
    assert_same,
    blobs,
    partial,
    refusal,
)
from tests.checkpoint.hub_server import Hub, Repository
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.config import Config
from toolkit.checkpoint.download import ATTEMPTS_WITHOUT_PROGRESS
from toolkit.checkpoint.hub import resolve
from toolkit.console import Console
from toolkit.errors import UnsupportedError


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


def test_a_quantized_checkpoint_is_named_before_the_weights(
    hub: Hub, cache: Path, source: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    hub.repositories[ID] = Repository({COMMIT: folder}, {"main": COMMIT})
    with pytest.raises(UnsupportedError, match="with bitsandbytes to 4 bits"):
        resolve(ID, QUIET, cache=cache)
    assert FIRST not in hub.fetched()


def test_templates_in_a_folder_are_fetched(
    hub: Hub, cache: Path, source: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    texts = {"chat_template.jinja": "first", "additional_chat_templates/tool_use.jinja": "second"}
    for name, text in {**texts, "additional_chat_templates/more/deep.jinja": "no"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    hub.repositories[ID] = Repository({COMMIT: folder}, {"main": COMMIT})
    checkpoint = resolve(ID, QUIET, cache=cache)
    assert {name: (checkpoint.folder / name).read_text("utf-8") for name in texts} == texts
    assert not (checkpoint.folder / "additional_chat_templates/more").exists()
