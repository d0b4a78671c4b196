"""Installing in Ollama: against a server that keeps its API contract and runs the weights."""

import json
import shutil
import signal
import threading
import time
from pathlib import Path

import msgspec
import pytest

from tests.deploy.sealed import seal_noise
from tests.exports.ollama_server import OllamaServer
from toolkit.artifact import Smoke, hash_file, read_manifest
from toolkit.console import Console
from toolkit.deploy import Push
from toolkit.device import Device, Health
from toolkit.errors import (
    ArtifactError,
    PreflightError,
    RolledBackError,
    RunnerError,
    SmokeError,
    StrandedError,
    UnreachableError,
)
from toolkit.ollama import (
    install,
    install_on_device,
    name_model,
    read_model,
    roll_back,
    roll_back_on_device,
)
from toolkit.report import Report

NAME = "tiny-phi3-gguf-q4_0"


@pytest.fixture
def folder(artifacts: dict[str, Path]) -> Path:
    return artifacts["gguf"]


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Path:
    """The same weights under another manifest: another artifact of the same name."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
    manifest["notes"] = ["another"]
    manifest["context_length"] = 256
    text = (copy / "Modelfile").read_text("utf-8").replace("num_ctx 512", "num_ctx 256")
    (copy / "Modelfile").write_text(text, "utf-8")
    for file in manifest["files"]:
        if file["path"] == "Modelfile":
            file["size_bytes"] = (copy / "Modelfile").stat().st_size
            file["sha256"] = hash_file(copy / "Modelfile")
    (copy / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return copy


def tag_of(folder: Path) -> str:
    return f"{NAME}:{hash_file(folder / 'manifest.json')[:12]}"


def run(folder: Path, server: OllamaServer, console: Console, **options: object) -> Report:
    report = Report("install")
    install(folder, server.base_url, "pi", console, report=report, **options)  # type: ignore[arg-type]
    return report


def test_a_first_installation(folder: Path, ollama: OllamaServer, console: Console) -> None:
    report = run(folder, ollama, console)
    state = ollama.state
    assert set(state.tags) == {f"{NAME}:latest", tag_of(folder)}
    manifest = read_manifest(folder)
    made = state.tags[f"{NAME}:latest"]
    assert set(manifest.chat.stop_texts) <= set(made.parameters["stop"])
    assert made.parameters["num_ctx"] == manifest.context_length
    assert [step.name for step in report.steps] == [
        "check artifact", "connect", "transfer", "create", "smoke test", "switch", "health",
        "prune",
    ]  # fmt: skip
    assert report.ok
    assert "Paris" in report.steps[4].measured
    first = [request.split("sha256")[0] for request in state.requests]
    assert first[:5] == [
        "GET /api/version", "GET /api/tags", "GET /api/tags", "HEAD /api/blobs/",
        "POST /api/blobs/",
    ]  # fmt: skip
    assert not [path for path in state.folder.iterdir() if path.name.startswith("upload")]


def test_a_tokenizer_that_differs_is_told(
    changed: Path, ollama: OllamaServer, console: Console
) -> None:
    manifest = json.loads((changed / "manifest.json").read_text("utf-8"))
    manifest["runtime"]["tokenizer"] = "tokenizers"
    (changed / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    told = run(changed, ollama, console).steps[0].measured
    assert told.endswith("; its own tokenizer differs from the source's: see the manifest's notes")


def test_again_sends_and_creates_nothing(
    folder: Path, ollama: OllamaServer, console: Console
) -> None:
    run(folder, ollama, console)
    ollama.state.requests.clear()
    report = run(folder, ollama, console)
    assert not [r for r in ollama.state.requests if r.startswith("POST") and "chat" not in r]
    assert [step.measured for step in report.steps if step.name == "switch"] == [
        "was in use already"
    ]


def test_the_one_before_is_kept_and_returned_to(
    folder: Path, changed: Path, ollama: OllamaServer, console: Console
) -> None:
    tags = ollama.state.tags
    run(folder, ollama, console)
    first = tags[f"{NAME}:latest"]
    run(changed, ollama, console)
    second = tags[f"{NAME}:latest"]
    assert (first.parameters["num_ctx"], second.parameters["num_ctx"]) == (512, 256)
    assert tags[f"{NAME}:previous"] is first
    assert f"{NAME}:good" not in tags
    roll_back(ollama.base_url, "pi", read_manifest(changed), Report("rollback"))
    assert tags[f"{NAME}:latest"] is first
    assert tags[f"{NAME}:previous"] is second


def test_old_artifacts_are_pruned(
    folder: Path, changed: Path, ollama: OllamaServer, console: Console
) -> None:
    stranger = f"{NAME}:mine"
    run(folder, ollama, console)
    tags = ollama.state.tags
    tags[f"{NAME}:0123456789ab"] = tags[stranger] = type(tags[tag_of(folder)])({}, "", {"a": 1})
    run(changed, ollama, console)
    assert f"{NAME}:0123456789ab" not in tags
    assert {stranger, tag_of(folder), tag_of(changed)} < set(tags)


def test_a_wrong_answer_leaves_nothing_behind(
    folder: Path, ollama: OllamaServer, console: Console
) -> None:
    question = Smoke(prompt="What is the capital of France?", expect="Lisbon")
    with pytest.raises(SmokeError, match=r"pi: asked .* expected 'Lisbon' in it"):
        run(folder, ollama, console, push=Push(smoke=question))
    assert ollama.state.tags == {}
    assert list(ollama.state.folder.glob("sha256-*")) == []


def test_a_wrong_template_is_found_out(
    folder: Path, ollama: OllamaServer, console: Console, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    text = (copy / "Modelfile").read_text("utf-8").replace('<|assistant|>\n"""', '"""')
    (copy / "Modelfile").write_text(text, "utf-8")
    manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
    for file in manifest["files"]:
        file["size_bytes"] = (copy / file["path"]).stat().st_size
        file["sha256"] = hash_file(copy / file["path"])
    (copy / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(SmokeError):
        run(copy, ollama, console)
    assert ollama.state.tags == {}


def test_a_stop_text_in_the_answer_is_an_error(
    folder: Path, ollama: OllamaServer, console: Console
) -> None:
    ollama.state.faults.spoil = lambda tag, text: f"{text}<|end|>"
    with pytest.raises(SmokeError, match=r"Ollama did not stop at <\|end\|>"):
        run(folder, ollama, console)
    assert ollama.state.tags == {}


def test_other_words_after_the_switch_go_back(
    folder: Path, changed: Path, ollama: OllamaServer, console: Console
) -> None:
    run(folder, ollama, console)
    tags = dict(ollama.state.tags)
    ollama.state.faults.spoil = lambda tag, text: (
        text.replace("Paris", "Rome") if tag.endswith(":latest") else text
    )
    with pytest.raises(RolledBackError, match=r"tiny-phi3-gguf-q4_0:latest on pi is back on the"):
        run(changed, ollama, console)
    assert ollama.state.tags == tags


def test_a_first_installation_goes_back_to_nothing(
    folder: Path, ollama: OllamaServer, console: Console
) -> None:
    limits = Health(min_tokens_per_second=10**12)
    with pytest.raises(RolledBackError, match="back on nothing, as before"):
        run(folder, ollama, console, limits=limits)
    assert ollama.state.tags == {}


@pytest.mark.parametrize("had_before", [True, False])
def test_a_disk_that_is_full_after_the_switch(
    had_before: bool, folder: Path, changed: Path, ollama: OllamaServer, console: Console
) -> None:
    if had_before:
        run(folder, ollama, console)
    tags, faults = dict(ollama.state.tags), ollama.state.faults

    def fill(tag: str, text: str) -> str:
        if tag.endswith(":latest"):
            faults.chat_error = "write cache: no space left on device"
        return text

    faults.spoil = fill
    with pytest.raises(RolledBackError, match=r"is full: .*; tiny-.*:latest on pi is back on"):
        run(changed, ollama, console)
    assert ollama.state.tags == tags


@pytest.mark.parametrize("had_before", [True, False])
def test_ctrl_c_after_the_switch(
    had_before: bool, folder: Path, changed: Path, ollama: OllamaServer, console: Console
) -> None:
    if had_before:
        run(folder, ollama, console)
    tags = dict(ollama.state.tags)

    def interrupt(tag: str, text: str) -> str:
        if tag.endswith(":latest"):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return text

    ollama.state.faults.spoil = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(changed, ollama, console)
    assert ollama.state.tags == tags


def test_the_way_back_may_fail_too(
    folder: Path, changed: Path, ollama: OllamaServer, console: Console
) -> None:
    run(folder, ollama, console)
    ollama.state.faults.refuse_copies_from = ":good"
    with pytest.raises(StrandedError, match="and the way back failed: pi: Ollama did not name"):
        run(changed, ollama, console, limits=Health(max_memory=1))  # type: ignore[arg-type]


def test_an_installation_that_was_cut_off_is_undone_first(
    folder: Path, changed: Path, ollama: OllamaServer, console: Console
) -> None:
    run(folder, ollama, console)
    tags = ollama.state.tags
    first = tags[f"{NAME}:good"] = tags[f"{NAME}:latest"]
    tags[f"{NAME}:latest"] = type(first)(first.files, "bad", first.parameters)
    report = run(changed, ollama, console)
    assert "recover" in [step.name for step in report.steps]
    assert tags[f"{NAME}:previous"] is first


def test_a_full_disk(folder: Path, ollama: OllamaServer, console: Console) -> None:
    ollama.state.faults.disk_bytes = 200_000
    with pytest.raises(PreflightError, match="disk that holds Ollama's models is full"):
        run(folder, ollama, console)
    assert ollama.state.tags == {}
    deadline_s = time.monotonic() + 30  # its thread may still be clearing up
    while list(ollama.state.folder.iterdir()) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert list(ollama.state.folder.iterdir()) == []


def test_a_connection_that_breaks(folder: Path, ollama: OllamaServer, console: Console) -> None:
    ollama.state.faults.drop_upload = True
    with pytest.raises(UnreachableError, match="the connection to Ollama at http"):
        run(folder, ollama, console)
    ollama.state.faults.drop_upload = False
    assert run(folder, ollama, console).ok


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ({"create_error": "invalid file magic"}, "did not create the model: 'invalid file magic'"),
        ({"chat_error": "llama runner terminated"}, "not answer: 'llama runner terminated'"),
        ({"is_cut": True}, "Ollama's answer broke off"),
    ],
)
def test_errors_inside_streams(
    fault: dict[str, object], text: str, folder: Path, ollama: OllamaServer, console: Console
) -> None:
    for name, value in fault.items():
        setattr(ollama.state.faults, name, value)
    with pytest.raises(RunnerError, match=text):
        run(folder, ollama, console)
    assert ollama.state.tags == {}


def test_an_old_ollama(folder: Path, ollama: OllamaServer, console: Console) -> None:
    ollama.state.faults.version = "0.5.4"
    with pytest.raises(PreflightError, match=r"Ollama 0\.5\.4 cannot .* allowed 0\.5\.5 or newer"):
        run(folder, ollama, console)
    ollama.state.faults.version = "0.5.5-rc1"
    run(folder, ollama, console, push=Push(dry_run=True))
    assert ollama.state.tags == {}


def test_nobody_there(folder: Path, ollama: OllamaServer, console: Console) -> None:
    ollama.stop()
    with pytest.raises(UnreachableError, match="Ollama is not running: nothing answers at"):
        run(folder, ollama, console)


def test_through_ssh(folder: Path, ollama: OllamaServer, board: Device, console: Console) -> None:
    port = int(ollama.base_url.rpartition(":")[2])
    report = install_on_device(folder, board, console, port=port)
    assert report.ok
    assert f"{NAME}:latest" in ollama.state.tags
    with pytest.raises(PreflightError, match="nothing to return to"):
        roll_back_on_device(folder, board, Report("rollback"), port=port)


def test_nobody_at_the_other_end_of_the_tunnel(
    folder: Path, board: Device, console: Console
) -> None:
    with pytest.raises(UnreachableError, match="Ollama is not running"):
        install_on_device(folder, board, console, port=9)


def test_no_gguf(tmp_path: Path, ollama: OllamaServer, console: Console) -> None:
    with pytest.raises(ArtifactError, match="Ollama runs GGUF; this artifact is onnx"):
        run(seal_noise(tmp_path / "noise"), ollama, console)


def test_nothing_to_roll_back_to(folder: Path, ollama: OllamaServer) -> None:
    with pytest.raises(PreflightError, match="has no tiny-phi3-gguf-q4_0:previous"):
        roll_back(ollama.base_url, "pi", read_manifest(folder), Report("rollback"))


def test_turns_of_a_fine_tune_come_from_the_manifest(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert "{{ .Role }}" in read_model(folder, manifest).template
    turns = {**manifest.chat.turns, "user": ("<|human|>", "<|end|>")}
    chat = msgspec.structs.replace(manifest.chat, turns=turns)
    model = read_model(folder, msgspec.structs.replace(manifest, chat=chat))
    assert "<|human|>{{ .Content }}<|end|>" in model.template


@pytest.mark.parametrize(
    ("name", "expected"), [("a b/c", "a-b-c"), ("..x", "x"), ("-", "model"), ("q" * 99, "q" * 80)]
)
def test_names(name: str, expected: str) -> None:
    assert name_model(name) == expected
