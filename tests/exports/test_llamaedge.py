"""LlamaEdge: the start script's command line, and the smoke test through its API."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.deploy.sealed import seal_noise
from toolkit.artifact import Smoke, read_manifest
from toolkit.device import Device
from toolkit.errors import ArtifactError, SmokeError, UnreachableError
from toolkit.formats.gguf.llamaedge import SCRIPT, write_script
from toolkit.llamaedge import check_on_device, check_server, check_start
from toolkit.report import Report

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
    report = Report("LlamaEdge")
    answer = check_server(served, "pi", manifest, report)
    assert "Paris" in answer.text
    assert report.ok


def test_through_ssh(served: str, artifacts: dict[str, Path], board: Device) -> None:
    port = int(served.removesuffix("/v1").rpartition(":")[2])
    report = Report("LlamaEdge")
    answer = check_on_device(artifacts["gguf"], board, report, port=port)
    assert "Paris" in answer.text


def test_a_wrong_answer_is_an_error(served: str, artifacts: dict[str, Path]) -> None:
    question = Smoke(prompt="What is the capital of France?", expect="Lisbon")
    with pytest.raises(SmokeError, match="expected 'Lisbon' in it"):
        check_server(served, "pi", read_manifest(artifacts["gguf"]), Report(""), smoke=question)


def test_nobody_there(artifacts: dict[str, Path]) -> None:
    with pytest.raises(UnreachableError, match="cannot be reached"):
        check_server("http://127.0.0.1:9/v1", "pi", read_manifest(artifacts["gguf"]), Report(""))


def test_what_has_no_script(artifacts: dict[str, Path], tmp_path: Path) -> None:
    assert check_start(read_manifest(artifacts["gguf"])) == SCRIPT
    with pytest.raises(ArtifactError, match=r"no llamaedge\.sh in it"):
        check_start(read_manifest(seal_noise(tmp_path / "noise")))


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
