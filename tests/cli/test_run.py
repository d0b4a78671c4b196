"""`run` and `serve`: the same model in the terminal and over HTTP, here and on a device."""

import contextlib
import io
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import ROOT, events, run, start
from toolkit.runner.chatting import Message, TakeText, clean
from toolkit.runner.chatting import converse as converse_with

QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
WAIT_S = 120


@pytest.fixture
def place(artifacts: dict[str, Path], tmp_path: Path) -> dict[str, str]:
    """Where an embedded device has a release in use."""
    environment = {"PHISHIP_EMBEDDED_ROOT": str(tmp_path / "device")}
    assert run("deploy", str(artifacts["onnx"]), "embedded", **environment).returncode == 0
    return environment


def converse(
    words: list[str], lines: str, **environment: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "toolkit", *words], input=lines, capture_output=True, text=True,
        cwd=ROOT, env={**os.environ, **environment}, timeout=WAIT_S, check=False,
    )  # fmt: skip


@contextlib.contextmanager
def serving(*words: str, **environment: str) -> Iterator[dict[str, Any]]:
    """Start a serving command; yields the event in which it says where. It ends with Ctrl-C."""
    process = start(*words, "--json", **environment)
    try:
        for line in process.stdout or []:
            told = json.loads(line)
            if told.get("event") == "serving" or "listening" in told:
                break
        else:
            raise AssertionError(process.communicate())
        yield told
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=WAIT_S)
    assert process.returncode == 0


def ask(base_url: str, question: str = QUESTION) -> str:
    body = {"messages": [{"role": "user", "content": question}]}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        f"{base_url}/chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=WAIT_S) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


def test_one_question(artifacts: dict[str, Path], place: dict[str, str]) -> None:
    for text in (str(artifacts["onnx"]), "embedded"):
        done = run("run", text, "--prompt", QUESTION, **place)
        assert (done.returncode, done.stdout.strip()) == (0, ANSWER), done.stderr
        assert "tokens/s" in done.stderr
    told = events(run("run", "embedded", "--prompt", QUESTION, "--json", **place))
    assert told[-1]["text"] == ANSWER


def test_conversation_remembers(artifacts: dict[str, Path], place: dict[str, str]) -> None:
    """Same answers here and through a device's server; an order is no question."""
    lines = f"{QUESTION}\n/help\n\n/new\n{QUESTION}\n/exit\n{QUESTION}\n"
    for text in (str(artifacts["onnx"]), "embedded"):
        done = converse(["run", text], lines, **place)
        assert (done.returncode, done.stdout) == (0, f"{ANSWER}\n{ANSWER}\n"), done.stderr
        assert "Ctrl-D" in done.stderr


def test_conversation_too_long_goes_on_anew(artifacts: dict[str, Path]) -> None:
    lines = f"{'word ' * 2000}\n/new\n{QUESTION}\n"
    done = converse(["run", str(artifacts["onnx"])], lines)
    assert done.stdout == f"{ANSWER}\n"
    assert "context holds" in done.stderr and "/new begins anew" in done.stderr


def test_interrupt_ends_the_answer_and_not_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was shown of it stays part of the conversation."""
    heard = []

    def ask(messages: list[Message], take_text: TakeText) -> None:
        heard.append(list(messages))
        take_text("The capital")
        if len(heard) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\n"))
    assert converse_with(ask, "", "Be short.") == 0
    assert capsys.readouterr().out == "The capital [broken off]\nThe capital\n"
    assert heard[1] == [
        ("system", "Be short."), ("user", "first"), ("assistant", "The capital"),
        ("user", "second"),
    ]  # fmt: skip


def test_interrupt_on_a_terminal(artifacts: dict[str, Path]) -> None:
    """Once, whether at an answer or after it, is no end; twice at the prompt is."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "toolkit", "run", str(artifacts["onnx"])])
    shown = b""

    def read_until(text: bytes) -> None:
        nonlocal shown
        deadline_s = time.monotonic() + WAIT_S
        while text not in shown:
            assert time.monotonic() < deadline_s, shown
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 4096)
        shown = shown.partition(text)[2]

    try:
        read_until(b"> ")
        os.write(terminal, f"{QUESTION}\n".encode())
        read_until(b"Paris.")
        for _ in range(2):
            read_until(b"> ")
            time.sleep(0.5)  # readline is not listening as soon as its prompt is there
            os.write(terminal, b"\x03")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        os.close(terminal)


def test_serve_brings_a_device_here(place: dict[str, str]) -> None:
    with serving("serve", "embedded", "--port", "0", **place) as told:
        assert ask(told["base_url"]) == ANSWER
        assert told["model"].startswith("tiny-phi3-onnx")
    with pytest.raises(OSError, match="refused"):
        ask(told["base_url"])
    deadline_s = time.monotonic() + WAIT_S
    while left := subprocess.run(
        ["pgrep", "-f", f"{place['PHISHIP_EMBEDDED_ROOT']}.*runner.pyz serve"],
        capture_output=True, text=True, check=False,
    ).stdout:  # fmt: skip
        assert time.monotonic() < deadline_s, f"still there: {left}"
        time.sleep(0.2)


def test_serve_here(artifacts: dict[str, Path]) -> None:
    with serving("run", str(artifacts["gguf"]), "--serve", "--port", "0") as told:
        assert ask(f"{told['listening']}/v1") == ANSWER


def test_port_in_use(place: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        done = run("serve", "embedded", "--port", str(number), **place)
    assert done.returncode == 3
    assert f"port {number} of this machine: Address already in use" in done.stderr
    assert "choose another with --port" in done.stderr


@pytest.mark.parametrize("words", [["run"], ["serve"]])
def test_nothing_deployed(words: list[str], tmp_path: Path) -> None:
    done = run(*words, "embedded", PHISHIP_EMBEDDED_ROOT=str(tmp_path))
    assert done.returncode == 14
    assert "no release is deployed there" in done.stderr


def test_model_that_does_not_fit_is_not_loaded(artifacts: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    for path in artifacts["onnx"].iterdir():
        (folder / path.name).symlink_to(path)
    text = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps({**text, "device_memory_bytes": 10**15}))
    done = run("run", str(folder), "--prompt", "Hello")
    assert done.returncode == 14
    assert "needs 1000000.00 GB of memory" in done.stderr
    assert "are available" in done.stderr


def test_wrong_usage(artifacts: dict[str, Path]) -> None:
    assert "phiship serve DEVICE" in run("run", "embedded", "--serve").stderr
    done = run("serve", "embedded", "--install", "--remove")
    assert (done.returncode, "exclude each other" in done.stderr) == (2, True)
    done = run("serve", "embedded", "--token-env", "X")
    assert (done.returncode, "belong to --install" in done.stderr) == (2, True)
    done = run("run", str(artifacts["onnx"].parent / "nowhere"), "--prompt", "x")
    assert done.returncode == 10 and "not a sealed artifact" in done.stderr


def test_a_model_cannot_steer_the_terminal() -> None:
    assert clean("a\x1b[2Jb\tc\nd\u202ee\r日本 😀") == "a[2Jb\tc\nde日本 😀"
