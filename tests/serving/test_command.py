"""The command: where it listens, what it refuses to do, and how it ends."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.running import ROOT, TIMEOUT_S, running
from toolkit.runner.failure import Failure
from toolkit.runner.serving.options import read_token

RUNNER = [sys.executable, "-m", "toolkit.runner", "serve"]


def fail(artifact: Path, *more: str, **environment: str) -> str:
    """Run a command that fails; returns the one sentence it says."""
    done = subprocess.run(
        [*RUNNER, "--artifact", str(artifact), *more, "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, ""), done.stderr
    return str(json.loads(done.stdout)["error"]["message"])


def test_it_says_where_it_listens(artifacts: dict[str, Path]) -> None:
    with running([*RUNNER, "--artifact", str(artifacts["onnx"]), "--port", "0", "--json"]) as one:
        assert one.told["listening"] == f"http://127.0.0.1:{one.port}"
        assert one.told["engine"].startswith("onnxruntime-genai ")
        assert one.ask("GET", "/health").status == 200
        assert one.stop() == 0


def test_people_read_a_sentence(artifacts: dict[str, Path]) -> None:
    command = [*RUNNER, "--artifact", str(artifacts["onnx"]), "--port", "0", "--host", "::1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    line = process.stdout.readline()
    process.terminate()
    assert process.wait(TIMEOUT_S) == 0
    assert line.startswith("tiny-phi3-onnx-cpu-int4 answers at http://[::1]:")


def test_a_port_in_use(artifacts: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = fail(artifacts["onnx"], "--port", str(port))
    assert message == f"port {port} of 127.0.0.1 cannot be taken: Address already in use"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--host", "0.0.0.0"], "there is no token"),
        (["--host", "::"], "there is no token"),
        (["--host", "192.0.2.1"], "there is no token"),
        (["--port", "70000"], "allowed: 0 to 65535"),
        (["--queue", "-1"], "allowed: 0 or more"),
        (["--token-file", "/nowhere"], "/nowhere: the token cannot be read"),
    ],
)
def test_what_is_not_begun(artifacts: dict[str, Path], more: list[str], words: str) -> None:
    assert words in fail(artifacts["onnx"], *more)


def test_an_address_of_another_machine(artifacts: dict[str, Path]) -> None:
    message = fail(artifacts["onnx"], "--host", "192.0.2.1", PHISHIP_TOKEN="secret")
    assert message.startswith("port 8080 of 192.0.2.1 cannot be taken: ")
    assert "secret" not in message


def test_a_token_in_a_file(artifacts: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-a-file\n")
    command = [*RUNNER, "--artifact", str(artifacts["onnx"]), "--host", "0.0.0.0", "--port", "0"]
    with running([*command, "--json", "--token-file", str(file)]) as server:
        right = {"Authorization": "Bearer from-a-file"}
        assert server.ask("GET", "/v1/models", None, right).status == 200
        assert server.ask("GET", "/v1/models").status == 401


@pytest.mark.parametrize("text", ["", "\n", "two words", "zwei\nzeilen", "schlüssel"])
def test_what_is_no_token(tmp_path: Path, text: str) -> None:
    file = tmp_path / "token"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(Failure, match="a token is one line"):
        read_token(file)
    with pytest.raises(Failure, match="a token is one line"):
        read_token(None, {"PHISHIP_TOKEN": text})
    assert read_token(None, {}) is None


def test_it_ends_with_its_parent(artifacts: dict[str, Path]) -> None:
    command = [*RUNNER, "--artifact", str(artifacts["onnx"]), "--port", "0", "--json"]
    with running([*command, "--until-eof"]) as server:
        assert server.ask("GET", "/health").status == 200
        assert server.process.stdin
        server.process.stdin.close()
        assert server.wait() == 0
        assert server.log == []
