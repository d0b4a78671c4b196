"""LlamaEdge: the start script's command line, and the smoke test through its API."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from tests import templates
from tests.conftest import ROOT
from tests.deploy.sealed import QUESTION, seal_noise
from tests.exports.test_go_template import carry
from toolkit.artifact import Smoke, read_manifest, write_manifest
from toolkit.console import Console
from toolkit.deploy import Push, roll_back
from toolkit.device import Device
from toolkit.errors import ArtifactError, RunnerError, SmokeError, UnreachableError
from toolkit.formats.gguf.llamaedge import SCRIPT, choose_template, write_script
from toolkit.llamaedge import (
    ADDRESS_VARIABLE,
    SERVER_VARIABLE,
    ask_server,
    ask_there,
    check_start,
    deploy_to_llamaedge,
)
from toolkit.remote import read_status
from toolkit.report import Report
from toolkit.ssh.embedded import EmbeddedDevice
from toolkit.ssh.session import open_session

SHELLS = [shell for shell in ("sh", "dash", "bash", "busybox") if shutil.which(shell)]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `wasmedge`, which is tests/exports/wasmedge.py."""
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "wasmedge"
    program.write_text(
        f"#!/bin/sh\nPYTHONPATH='{ROOT}' exec '{sys.executable}' -m tests.exports.wasmedge \"$@\"\n"
    )
    program.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def served(
    artifacts: dict[str, Path], programs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The artifact, started by its own script from another folder, whose name has a space."""
    folder = tmp_path_factory.mktemp("led") / "it's an artifact"
    shutil.copytree(artifacts["gguf"], folder)
    (folder.parent / "server.wasm").write_bytes(b"\0asm")
    variables = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "LLAMAEDGE_ADDRESS": "127.0.0.1:0",
        "LLAMAEDGE_SERVER": "server.wasm",
    }
    with subprocess.Popen(
        ["sh", str(folder / SCRIPT), "--threads", "1"], env=os.environ | variables,
        cwd=folder.parent, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        process.kill()


def test_the_script_serves_the_model_that_answers(served: str, artifacts: dict[str, Path]) -> None:
    manifest = read_manifest(artifacts["gguf"])
    assert manifest.smoke
    assert "Paris" in ask_server(served, "pi", manifest, manifest.smoke).text


def test_nobody_there(artifacts: dict[str, Path]) -> None:
    with pytest.raises(UnreachableError, match="cannot be reached"):
        ask_server("http://127.0.0.1:9/v1", "pi", read_manifest(artifacts["gguf"]), QUESTION)


@pytest.fixture
def embedded(
    start_embedded: Callable[..., EmbeddedDevice], programs: Path, tmp_path: Path
) -> EmbeddedDevice:
    """It has wasmedge, LlamaEdge's server, and no engine of ours."""
    (tmp_path / "embedded" / "home").mkdir(parents=True)
    (tmp_path / "embedded" / "home" / "llama-api-server.wasm").write_bytes(b"\0asm")
    return start_embedded(environment={"PATH": f"{programs}:/usr/bin:/bin"})


@pytest.fixture
def device(embedded: EmbeddedDevice) -> Device:
    return embedded.start()


def test_deploy_asks_what_the_script_serves(
    artifacts: dict[str, Path], device: Device, console: Console, tmp_path: Path
) -> None:
    report = Report("LlamaEdge")
    deploy_to_llamaedge(artifacts["gguf"], device, console, Push(), report)
    steps = {step.name: step.measured for step in report.steps}
    assert "Paris" in steps["smoke test"] and "LlamaEdge" in steps["smoke test"]
    first = read_status(device).current
    assert first and read_status(device).state.good == first
    wrong = Push(smoke=Smoke(prompt="What is the capital of France?", expect="Lisbon"))
    other = tmp_path / "other"
    shutil.copytree(artifacts["gguf"], other)
    manifest = read_manifest(other)
    write_manifest(other, msgspec.structs.replace(manifest, notes=("another",)))
    with pytest.raises(SmokeError, match="expected 'Lisbon' in it"):
        deploy_to_llamaedge(other, device, console, wrong, Report(""))
    assert read_status(device).current == first
    deploy_to_llamaedge(other, device, console, Push(), Report(""))
    assert read_status(device).current != first
    roll_back(device, Report(""), ask=ask_there)
    assert read_status(device).current == first


def test_server_ends_with_the_push_that_started_it(
    artifacts: dict[str, Path], embedded: EmbeddedDevice, device: Device, console: Console
) -> None:
    """Even when the agent is killed: a real process must not keep a board's memory."""
    deploy_to_llamaedge(artifacts["gguf"], device, console, Push(), Report(""))
    with suppress(UnreachableError), open_session(device) as session:
        told = session.call(
            "start_script", release="current", script=SCRIPT, address_variable=ADDRESS_VARIABLE,
            ready_path="/v1/models", environment={SERVER_VARIABLE: device.llamaedge_server},
        )  # fmt: skip
        with socket.create_connection(("127.0.0.1", told["port"])):
            pass
        embedded.power_cut()  # kills the agent, and what is in its group
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        try:
            socket.create_connection(("127.0.0.1", told["port"])).close()
        except OSError:
            return
        time.sleep(0.1)
    raise AssertionError("it is still there")


def test_script_that_cannot_start(
    artifacts: dict[str, Path], device: Device, console: Console
) -> None:
    elsewhere = msgspec.structs.replace(device, llamaedge_server="~/nowhere.wasm")
    with pytest.raises(RunnerError, match=r"exit code 66: .*nowhere\.wasm is not there"):
        deploy_to_llamaedge(artifacts["gguf"], elsewhere, console, Push(), Report(""))
    assert read_status(device).releases == ()


def test_what_has_no_script(artifacts: dict[str, Path], tmp_path: Path) -> None:
    check_start(artifacts["gguf"], read_manifest(artifacts["gguf"]))
    with pytest.raises(ArtifactError, match=r"no llamaedge\.sh in it"):
        check_start(tmp_path, read_manifest(seal_noise(tmp_path / "noise")))


def test_a_script_for_another_chat(artifacts: dict[str, Path]) -> None:
    manifest = read_manifest(artifacts["gguf"])
    turns = {**manifest.chat.turns, "user": ("<|im_start|>user\n", "<|im_end|>\n")}
    chat = msgspec.structs.replace(manifest.chat, turns=turns)
    with pytest.raises(ArtifactError, match="names another chat template than chatml") as caught:
        check_start(artifacts["gguf"], msgspec.structs.replace(manifest, chat=chat))
    assert "--runtime ollama" in caught.value.advice


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "chatml"), ("phi-3", "phi-3-chat"), ("trimmed", "phi-3-chat"),
        ("zephyr", "zephyr"), ("llama-2", "llama-2-chat"), ("llama-3.1", "llama-3-chat"),
        ("mistral", "mistral-instruct"), ("gemma-3", "gemma-instruct"),
        ("vicuna", "vicuna-1.1-chat"), ("openchat", "openchat"), ("alpaca", "chatml"),
    ],
)  # fmt: skip
def test_the_nearest_of_its_templates(name: str, expected: str) -> None:
    assert choose_template(carry(templates.read(name))) == expected


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("missing", ["wasmedge", "server"])
def test_what_is_missing_is_said(shell: str, missing: str, programs: Path, tmp_path: Path) -> None:
    script = tmp_path / SCRIPT
    script.write_text(write_script("a name; with 'marks'", 512))
    path = f"{programs}:{os.environ['PATH']}" if missing == "server" else "/usr/bin:/bin"
    command = [shell, "sh"] if shell == "busybox" else [shell]
    done = subprocess.run(
        [*command, str(script)], env={"PATH": path}, capture_output=True, text=True, check=False
    )
    expected = {"wasmedge": (127, "wasmedge is not installed"), "server": (66, "is not there; set")}
    assert done.returncode == expected[missing][0]
    assert expected[missing][1] in done.stderr


def test_the_script_is_safe_for_any_name() -> None:
    name = "x'; touch stolen; '$(touch stolen)"
    text = write_script(name, 512)
    [line] = [line for line in text.splitlines() if "--model-name" in line]
    done = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {line.strip().removesuffix(chr(92))}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == name
