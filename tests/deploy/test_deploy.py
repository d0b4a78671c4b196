"""Deploy, end to end: the device has the new release working, or the one it had."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.deploy.sealed import QUESTION, seal_noise
from tests.deploy.sshd import OpenSSH
from toolkit import preflight
from toolkit.artifact import Smoke, hash_file, list_files, read_manifest, write_manifest
from toolkit.console import Console
from toolkit.deploy import Push, deploy, name_release
from toolkit.device import Device, resolve_device
from toolkit.errors import (
    ArtifactError,
    HostKeyError,
    PhishipError,
    PreflightError,
    RunnerError,
    SmokeError,
    UnreachableError,
)
from toolkit.remote import generate, probe, read_status
from toolkit.report import Report
from toolkit.smoke import Answer, check_answer
from toolkit.ssh.bundle import pack_runner
from toolkit.ssh.embedded import EmbeddedDevice

STEPS = [
    "check artifact", "connect", "preflight", "runtime", "lock", "compare", "disk", "transfer",
    "stage", "smoke test", "switch", "health", "confirm", "prune",
]  # fmt: skip


def find_release(artifact: Path) -> str:
    manifest_sha256 = hash_file(artifact / "manifest.json")
    return name_release(read_manifest(artifact).name, manifest_sha256, pack_runner().sha256)


def find_steps(report: Report) -> dict[str, str]:
    return {step.name: step.measured for step in report.steps}


def put_stub_engine(folder: Path, program: str) -> dict[str, str]:
    """Put a module in the place of the runtime's, for crashes that a real one shows elsewhere."""
    folder.mkdir()
    (folder / "onnxruntime_genai.py").write_text(program)
    return {"PYTHONPATH": str(folder)}


def test_deploy_again_and_another(
    artifacts: dict[str, Path], device: Device, console: Console
) -> None:
    """The main job; the second time no file is sent and nothing is switched; then the other one."""
    artifact = artifacts["onnx"]
    smoke = read_manifest(artifact).smoke
    assert smoke
    first = deploy(artifact, device, console)
    assert first.ok
    assert [step.name for step in first.steps] == STEPS
    steps = find_steps(first)
    assert smoke.expect in steps["smoke test"]
    assert steps["switch"] == "from nothing"
    status = read_status(device)
    assert status.current == status.state.good == find_release(artifact)

    second = find_steps(deploy(artifact, device, console))
    assert second["compare"].startswith("0 of ")
    assert second["transfer"] == "0 B sent"
    assert second["switch"] == "was in use already"
    assert read_status(device).releases == (status.current,)

    other = find_steps(deploy(artifacts["gguf"], device, console))
    assert other["switch"] == f"from {status.current}"
    after = read_status(device)
    assert after.current == after.state.good == find_release(artifacts["gguf"])
    assert after.previous == status.current
    assert smoke.expect in generate(device, smoke.prompt, smoke.max_tokens).text


def test_wrong_answer_changes_nothing(
    artifacts: dict[str, Path], openssh: OpenSSH, tmp_path: Path, console: Console
) -> None:
    device = openssh.device(tmp_path / "device", host_key=openssh.fingerprint())
    deploy(artifacts["onnx"], device, console)
    before = read_status(device)
    wrong = Smoke(prompt="What is the capital of France?", expect="Atlantis")
    report = Report("deploy")
    with pytest.raises(SmokeError, match="'Atlantis'") as caught:
        deploy(artifacts["gguf"], device, console, Push(smoke=wrong), report=report)
    assert "it answered '" in str(caught.value)
    assert not report.ok
    assert [step.ok for step in report.steps] == [True] * 9 + [False]
    after = read_status(device)
    assert (after.current, after.previous, after.state, after.releases) == (
        before.current,
        before.previous,
        before.state,
        before.releases,
    )
    assert generate(device, "What is the capital of France?", 24).text


def test_wrong_answer_of_the_release_in_use(
    artifacts: dict[str, Path], board: Device, console: Console
) -> None:
    """It stays, although the same artifact has just failed another question."""
    deploy(artifacts["onnx"], board, console)
    with pytest.raises(SmokeError):
        deploy(artifacts["onnx"], board, console, Push(smoke=QUESTION))
    assert read_status(board).current == find_release(artifacts["onnx"])
    assert generate(board, "Hello", 4).text


def test_answer_is_compared_without_case_and_spaces(
    artifacts: dict[str, Path], board: Device, console: Console
) -> None:
    smoke = read_manifest(artifacts["onnx"]).smoke
    assert smoke
    loud = msgspec.structs.replace(smoke, expect=f"  {smoke.expect.upper()}\n")
    assert deploy(artifacts["onnx"], board, console, Push(smoke=loud)).ok


def test_words_of_a_model_cannot_steer_a_terminal() -> None:
    answer = Answer(
        text="\x1b[2J\u202egood \x9bm" + "x" * 1000,
        prompt_tokens=1,
        new_tokens=1,
        tokens_per_second=1.0,
        first_token_seconds=1.0,
        load_seconds=1.0,
        peak_memory_bytes=1,
        provider="cpu",
        engine="x",
        stop_reason="stop",
        token_ids=(1,),
    )
    with pytest.raises(SmokeError) as caught:
        check_answer("board", answer, QUESTION)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("signal", ["SIGILL", "SIGSEGV", "SIGKILL"])
def test_runner_that_crashes(
    start_embedded: Callable[..., EmbeddedDevice], tmp_path: Path, console: Console, signal: str
) -> None:
    """The runtime can be imported, and dies when it loads the model."""
    crash = (
        "import os, signal, sys\n"
        "__version__ = '0'\n"
        "Model = None\n"
        "class Config:\n"
        "    def __init__(self, folder):\n"
        "        print('loading', folder, file=sys.stderr, flush=True)\n"
        f"        os.kill(os.getpid(), signal.{signal})\n"
    )
    device = start_embedded(environment=put_stub_engine(tmp_path / "stub", crash)).start()
    config = {"genai_config.json": '{"model": {"type": "phi3", "context_length": 512}}'}
    with pytest.raises(RunnerError, match=f"killed by {signal}") as caught:
        deploy(seal_noise(tmp_path / "noise", more=config), device, console)
    assert "its last words: 'loading /" in str(caught.value)
    status = read_status(device)
    assert (status.current, status.releases) == (None, ())


def test_runtime_whose_import_crashes(
    start_embedded: Callable[..., EmbeddedDevice], tmp_path: Path, console: Console
) -> None:
    crash = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
    device = start_embedded(environment=put_stub_engine(tmp_path / "stub", crash)).start()
    report = Report("deploy")
    with pytest.raises(PreflightError, match="killed by SIGILL"):
        deploy(seal_noise(tmp_path / "noise"), device, console, report=report)
    assert [step.name for step in report.steps] == STEPS[:3]
    assert read_status(device).blobs == 1  # the runner alone


def test_runtime_that_is_not_there(
    start_embedded: Callable[..., EmbeddedDevice], tmp_path: Path, console: Console
) -> None:
    missing = "raise ImportError('libgomp.so.1: cannot open shared object file')\n"
    device = start_embedded(environment=put_stub_engine(tmp_path / "stub", missing)).start()
    with pytest.raises(PreflightError, match="libgomp") as caught:
        deploy(seal_noise(tmp_path / "noise"), device, console)
    assert "libgomp1" in caught.value.advice


def test_model_the_runtime_refuses(board: Device, tmp_path: Path, console: Console) -> None:
    """Noise instead of a graph, in the real runtime; nothing stays staged."""
    with pytest.raises(RunnerError, match="cannot load it"):
        deploy(seal_noise(tmp_path / "noise"), board, console)
    assert read_status(board).releases == ()


def test_disk_too_small(
    start_embedded: Callable[..., EmbeddedDevice],
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight, "DISK_RESERVE_BYTES", 100_000)
    device = start_embedded(quota_bytes=350_000).start()
    with pytest.raises(PreflightError, match=r"kB of disk are free; 30\d kB have to be sent"):
        deploy(seal_noise(tmp_path / "noise"), device, console)
    status = read_status(device)
    assert (status.blobs, status.incoming) == (1, ())


def test_memory_too_small(board: Device, tmp_path: Path, console: Console) -> None:
    artifact = seal_noise(tmp_path / "noise", memory_bytes=10**15)
    report = Report("deploy")
    with pytest.raises(PreflightError, match="1000000 GB"):
        deploy(artifact, board, console, report=report)
    assert "GB free" in report.steps[-1].measured
    assert read_status(board).blobs == 1


@pytest.mark.parametrize(("machine", "bits"), [("armv7l", 32), ("aarch64", 32), ("riscv64", 64)])
def test_machine_that_no_runtime_knows(
    start_embedded: Callable[..., EmbeddedDevice], tmp_path: Path, machine: str, bits: int
) -> None:
    facts = probe(start_embedded().start())
    other = msgspec.structs.replace(facts, machine=machine, word_bits=bits)
    with pytest.raises(PreflightError, match=f"{machine} with a {bits}-bit userland"):
        preflight.check_facts("board", other, read_manifest(seal_noise(tmp_path / "noise")))


def test_unchecked_artifact(tmp_path: Path, board: Device, console: Console) -> None:
    artifact = seal_noise(tmp_path / "noise", checked=False)
    with pytest.raises(ArtifactError, match="unchecked"):
        deploy(artifact, board, console)
    report = Report("deploy")
    with pytest.raises(RunnerError):  # it gets as far as its noise can
        deploy(artifact, board, console, Push(accept_unchecked=True), report=report)
    assert report.steps[-1].name == "smoke test"


def test_artifact_without_a_question(tmp_path: Path, console: Console) -> None:
    artifact = seal_noise(tmp_path / "noise", smoke=None)
    with pytest.raises(ArtifactError, match="no smoke test") as caught:
        deploy(artifact, resolve_device("embedded"), console)
    assert "--prompt" in caught.value.advice


@pytest.mark.parametrize("damage", ["one bit", "missing", "manifest", "no manifest"])
def test_damaged_artifact_never_leaves_this_machine(
    tmp_path: Path, console: Console, damage: str
) -> None:
    artifact = seal_noise(tmp_path / "noise")
    data = artifact / "parts" / "model.data"
    if damage == "one bit":
        data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    elif damage == "missing":
        data.unlink()
    elif damage == "manifest":
        (artifact / "manifest.json").write_text("{")
    else:
        (artifact / "manifest.json").unlink()
    report = Report("deploy")
    with pytest.raises(ArtifactError):
        deploy(artifact, resolve_device("embedded"), console, report=report)
    assert [step.name for step in report.steps] == ["check artifact"]


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname"])
def test_manifest_that_names_a_file_outside(
    tmp_path: Path, board: Device, console: Console, path: str
) -> None:
    artifact = seal_noise(tmp_path / "noise")
    (tmp_path / "outside").write_text("x")
    manifest = read_manifest(artifact)
    target = artifact / path
    outside = msgspec.structs.replace(
        list_files(artifact)[0], path=path, size_bytes=target.stat().st_size,
        sha256=hash_file(target),
    )  # fmt: skip
    write_manifest(artifact, msgspec.structs.replace(manifest, files=(outside,)))
    with pytest.raises(PhishipError, match="leads out"):
        deploy(artifact, board, console)
    assert read_status(board).releases == ()


def test_unreachable_device(tmp_path: Path, openssh: OpenSSH, console: Console) -> None:
    device = openssh.device(tmp_path, host="127.0.0.1", port=1)
    report = Report("deploy")
    with pytest.raises(UnreachableError):
        deploy(seal_noise(tmp_path / "noise"), device, console, report=report)
    assert [(step.name, step.ok) for step in report.steps] == [
        ("check artifact", True),
        ("connect", False),
    ]


def test_unknown_host_key(tmp_path: Path, openssh: OpenSSH, console: Console) -> None:
    with pytest.raises(HostKeyError, match="unknown"):
        deploy(seal_noise(tmp_path / "noise"), openssh.device(tmp_path / "device"), console)
    assert not (tmp_path / "device").exists()


def test_power_cut_while_sending(
    start_embedded: Callable[..., EmbeddedDevice],
    artifacts: dict[str, Path],
    tmp_path: Path,
    console: Console,
) -> None:
    """The release in use still answers afterwards, and the next push succeeds."""
    embedded = start_embedded()
    device = embedded.start()
    deploy(artifacts["gguf"], device, console)
    before = read_status(device)

    class PullThePlug(Console):
        def event(self, name: str, /, **fields: object) -> None:
            if name == "progress" and int(str(fields["done_bytes"])) > 1_000_000:
                embedded.power_cut()

    with pytest.raises(UnreachableError):
        deploy(artifacts["onnx"], device, PullThePlug(as_json=True))
    again = start_embedded().start()
    after = read_status(again)
    assert (after.current, after.state) == (before.current, before.state)
    assert len(after.incoming) <= 1
    assert generate(again, "Hello", 4).text
    assert deploy(artifacts["onnx"], again, console).ok
    assert read_status(again).incoming == ()


def test_same_artifact_with_another_runner_is_another_release(
    board: Device, artifacts: dict[str, Path], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer runner never changes a release in place."""
    deploy(artifacts["onnx"], board, console)
    before = read_status(board).current
    runner = pack_runner()
    # A zip file may have anything before its first entry.
    content = b"#!/usr/bin/env python3\n" + runner.content
    changed = dataclasses.replace(
        runner, content=content, sha256=__import__("hashlib").sha256(content).hexdigest()
    )
    for module in ("toolkit.deploy", "toolkit.ssh.session"):
        monkeypatch.setattr(f"{module}.pack_runner", lambda: changed)
    assert deploy(artifacts["onnx"], board, console).ok
    after = read_status(board)
    assert after.previous == before
    assert after.current != before


def test_question_without_a_release(board: Device) -> None:
    with pytest.raises(RunnerError, match="no release is deployed"):
        generate(board, "Hello")


def test_probe(device: Device) -> None:
    facts = probe(device, engine="llama_cpp")
    assert facts.engine
    assert facts.engine.importable
    assert facts.word_bits == 64
    assert facts.disk_free_bytes > 0


def test_embedded_by_name(
    tmp_path: Path,
    artifacts: dict[str, Path],
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `make demo` uses it: started for each command, its files stay."""
    monkeypatch.setenv("PHISHIP_EMBEDDED_ROOT", str(tmp_path / "board"))
    device = resolve_device("embedded")
    assert deploy(artifacts["onnx"], device, console).ok
    assert generate(device, "What is the capital of France?", 24).text
    shutil.rmtree(tmp_path / "board")
    assert read_status(device).current is None
